//! NEON, which every 64-bit ARM CPU has: 4 outputs to a register, four registers to a panel.
//!
//! The vector functions are `portable`'s: compiled for this architecture, they use the same registers.

mod attention;
pub(crate) mod matmul;

use crate::arch::portable;
use crate::kernels::Kernels;

pub(crate) const KERNELS: Kernels = Kernels {
    name: "neon",
    matmul_q_w8c: matmul::q_w8c,
    matmul_q_w4c: matmul::q_w4c,
    matmul_q_w8b: matmul::q_w8b,
    matmul_q_w6b: matmul::q_w6b,
    matmul_q_w5b: matmul::q_w5b,
    matmul_q_w4b: matmul::q_w4b,
    matmul_q_w4e: matmul::q_w4e,
    matmul_f32_f32: matmul::f32_f32,
    matmul_f32_f16: matmul::f32_f16,
    matmul_f32_bf16: matmul::f32_bf16,
    matmul_f32_w8c: matmul::f32_w8c,
    values_f32: attention::values_f32,
    values_f16: attention::values_f16,
    ..portable::KERNELS
};
