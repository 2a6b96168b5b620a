//! Prints the kernel tiers that this CPU can run, best first, one a line.
//!
//!     cargo run --example kernel_tiers
//!
//! `HTP_SIM_ISA=<tier>` makes any program of this project use a lower one.

fn main() {
    for kernels in htp_sim::Kernels::available() {
        println!("{}", kernels.name);
    }
}
