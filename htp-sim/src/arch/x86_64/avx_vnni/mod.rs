//! AVX2 with dot products of 8 and 16 bits in 256-bit registers (AVX-VNNI): CPUs that have VNNI but no AVX-512.

mod insn;
mod matmul;

use super::avx2;
use crate::kernels::Kernels;
use insn::{Encoding, Vex};

pub(crate) const KERNELS: Kernels = table::<Vex>("avx_vnni");

/// The same kernels with the instructions as AVX-512 encodes them, for tests on CPUs that have them in that form only.
#[cfg(test)]
pub(crate) const EVEX_KERNELS: Kernels = table::<insn::Evex>("avx_vnni_evex");

const fn table<E: Encoding>(name: &'static str) -> Kernels {
    Kernels {
        name,
        matmul_q_w8c: matmul::q_w8c::<E>,
        matmul_q_w4c: matmul::q_w4c::<E>,
        matmul_q_w8b: matmul::q_w8b::<E>,
        matmul_q_w6b: matmul::q_w6b::<E>,
        matmul_q_w5b: matmul::q_w5b::<E>,
        matmul_q_w4b: matmul::q_w4b::<E>,
        matmul_q_w4e: matmul::q_w4e::<E>,
        ..avx2::KERNELS
    }
}
