//! NEON with the 8-bit matrix product (`smmla`).

mod matmul;

use crate::arch::aarch64::neon;
use crate::kernels::Kernels;

pub(crate) const KERNELS: Kernels = Kernels {
    name: "i8mm",
    matmul_q_w8c: matmul::q_w8c,
    matmul_q_w4c: matmul::q_w4c,
    matmul_q_w8b: matmul::q_w8b,
    matmul_q_w6b: matmul::q_w6b,
    matmul_q_w5b: matmul::q_w5b,
    matmul_q_w4b: matmul::q_w4b,
    matmul_q_w4e: matmul::q_w4e,
    ..neon::KERNELS
};
