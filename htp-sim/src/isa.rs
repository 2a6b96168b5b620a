//! Which instruction sets this CPU has.

use std::fmt;

/// A tier name that is unknown, or known but not available on this CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IsaError {
    pub(crate) found: String,
    pub(crate) available: Vec<&'static str>,
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel tier {:?}: this CPU has {}", self.found, self.available.join(", "))
    }
}

impl std::error::Error for IsaError {}

/// Name of the environment variable that may choose a lower tier than the best one.
pub const ISA_VARIABLE: &str = "HTP_SIM_ISA";

/// AVX2 with FMA and half-float conversion.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// The 8-bit dot product in 256-bit registers, on top of [`has_avx2`].
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx_vnni() -> bool {
    has_avx2() && is_x86_feature_detected!("avxvnni")
}

/// AMX for 8-bit integers on top of [`has_avx512_vnni`], if the system lets this process use it. It is asked once.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_amx() -> bool {
    static HAS_AMX: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *HAS_AMX.get_or_init(|| has_avx512_vnni() && cpu_has_amx() && system_permits_tiles())
}

/// The tile unit and its products of 8-bit integers: leaf 7, bits 24 and 25 of edx.
#[cfg(target_arch = "x86_64")]
fn cpu_has_amx() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const TILES_AND_INT8: u32 = 0b11 << 24;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & TILES_AND_INT8 == TILES_AND_INT8
}

/// Asks Linux for the tile registers (8 KiB more to save for a thread that uses them), for all threads of the process.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn system_permits_tiles() -> bool {
    const SYS_ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let result: isize;
    // SAFETY: the call reads and writes no memory of ours; it clobbers rcx and r11.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result == 0
}

/// No other system is known to us.
#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn system_permits_tiles() -> bool {
    false
}

/// AVX-512 with byte and word operations and the 8-bit dot product, on top of [`has_avx2`].
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512_vnni() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni")
}

/// Whether AMD made this CPU. It is asked once: a virtual machine answers slowly.
#[cfg(target_arch = "x86_64")]
pub(crate) fn is_amd() -> bool {
    static IS_AMD: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *IS_AMD.get_or_init(|| {
        let leaf = std::arch::x86_64::__cpuid(0);
        [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD"
    })
}

/// NEON's 8-bit dot product.
#[cfg(target_arch = "aarch64")]
pub(crate) fn has_dotprod() -> bool {
    std::arch::is_aarch64_feature_detected!("dotprod")
}

/// NEON's 8-bit matrix product.
#[cfg(target_arch = "aarch64")]
pub(crate) fn has_i8mm() -> bool {
    std::arch::is_aarch64_feature_detected!("i8mm")
}
