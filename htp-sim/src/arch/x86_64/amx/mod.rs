//! AMX: tiles of 16 rows by 64 bytes for prompts, everything else from [`avx512_vnni`](super::avx512_vnni).
//!
//! Weights with one scale per output (8 and 4 bit, with steps or without) are summed in the tiles over all of k. So are those with a
//! float scale per block, rounded to 16 bits of the output's range, in products of 16 rows and more.

mod insn;
mod matmul;

#[cfg(test)]
mod emulated;

use super::avx512_vnni;
use crate::isa;
use crate::kernels::{IntegerTile, Kernels, Straight};
use insn::{Hardware, TileUnit};

const KERNELS: Kernels = table::<Hardware>("amx");

/// The same kernels over tiles in plain Rust, for tests on CPUs without the unit.
#[cfg(test)]
pub(crate) const EMULATED: Kernels = table::<emulated::Emulated>("amx_emulated");

const fn table<U: TileUnit>(name: &'static str) -> Kernels {
    Kernels {
        name,
        matmul_q_w8c: matmul::q_w8c::<U>,
        matmul_q_w4c: matmul::q_w4c::<U>,
        matmul_q_w4e: matmul::q_w4e::<U>,
        matmul_q_w8b: matmul::q_w8b::<U>,
        matmul_q_w6b: matmul::q_w6b::<U>,
        matmul_q_w5b: matmul::q_w5b::<U>,
        matmul_q_w4b: matmul::q_w4b::<U>,
        straight: Some(Straight {
            fits: matmul::fits_channels,
            fits_blocks: matmul::fits_blocks,
            fits_branch: matmul::fits_branch,
            q_w8c: matmul::q_w8c_straight::<U>,
            q_w4c: matmul::q_w4c_straight::<U>,
            q_w4e: matmul::q_w4e_straight::<U>,
            silu_w8c: matmul::silu_w8c::<U>,
            silu_w4c: matmul::silu_w4c::<U>,
            silu_w4e: matmul::silu_w4e::<U>,
            q_w8b: matmul::q_w8b_straight::<U>,
            q_w6b: matmul::q_w6b_straight::<U>,
            q_w5b: matmul::q_w5b_straight::<U>,
            q_w4b: matmul::q_w4b_straight::<U>,
            silu_w8b: matmul::silu_w8b::<U>,
            silu_w6b: matmul::silu_w6b::<U>,
            silu_w5b: matmul::silu_w5b::<U>,
            silu_w4b: matmul::silu_w4b::<U>,
        }),
        leave: leave::<U>,
        ..avx512_vnni::KERNELS
    }
}

fn leave<U: TileUnit>() {
    // SAFETY: a table with this unit exists only where it may be used.
    unsafe { U::release() }
}

/// The table, if this CPU has the unit, the system permits its use, and it computes what the plain kernel does.
pub(crate) fn kernels() -> Option<&'static Kernels> {
    // SAFETY: the unit was seen to be there and permitted.
    (isa::has_amx() && unsafe { agrees_with_portable() }).then_some(&KERNELS)
}

/// A product with full tiles and cut ones, by this table and in plain Rust.
///
/// # Safety
/// The CPU has AVX-512 VNNI and AMX for 8-bit integers, and the system permits its use.
unsafe fn agrees_with_portable() -> bool {
    const ROWS: usize = 19;
    const K: usize = 132;
    let mut bits = 1_u32;
    let mut next = || {
        bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (bits >> 24) as u8
    };
    let codes: [u8; K * 16] = std::array::from_fn(|_| next());
    let [hi, lo]: [[i8; ROWS * K]; 2] = std::array::from_fn(|_| std::array::from_fn(|_| next().cast_signed()));
    let scales = 1.0_f32.to_le_bytes().repeat(16);
    let tile = IntegerTile {
        rows: ROWS,
        all_rows: ROWS,
        panels: 1,
        k: K,
        hi: &hi,
        lo: &lo,
        x_stride: K,
        x_scales: &[1.0; ROWS],
        sums: &[],
        plane_sums: &[[0; 2]; ROWS],
        codes: &codes,
        panel_bytes: codes.len(),
        ahead: 0,
        width: 16,
        scales: &scales,
        offsets: &[],
        block: K,
        offset: crate::packed::BlockOffset::Symmetric,
        added: [(&[], 0.0); 2],
        branch: None,
    };
    let (mut found, mut expected) = ([0.0; ROWS * 16], [0.0; ROWS * 16]);
    // SAFETY: the caller's promise; the arrays above have the lengths that the tile states.
    unsafe { (KERNELS.matmul_q_w8c)(&tile, &mut found) };
    (KERNELS.leave)();
    // SAFETY: as above; plain Rust needs no instruction set.
    unsafe { (crate::arch::portable::KERNELS.matmul_q_w8c)(&tile, &mut expected) };
    found == expected
}
