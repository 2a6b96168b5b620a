//! AVX2 with FMA and half-float conversion: 8 outputs to a register, two registers to a panel.

mod attention;
pub(super) mod matmul;
mod quantize;
mod vector;

use crate::kernels::Kernels;

pub(crate) const KERNELS: Kernels = Kernels {
    name: "avx2",
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
    softmax: vector::softmax,
    log_scales: vector::log_scales,
    peak: vector::peak,
    weight_scales: vector::weight_scales,
    weigh: quantize::weigh,
    soft_cap: vector::soft_cap,
    sum_squares: vector::sum_squares,
    normalize: vector::normalize,
    quantize: quantize::quantize,
    unary: vector::unary,
    gate: vector::gate,
    rotate: vector::rotate,
    add_row: vector::add_row,
    store_rows: vector::store_rows,
    merge_totals: vector::merge_totals,
    merge: vector::merge,
    scale: vector::scale,
    straight: None,
    leave: || (),
    prefetch: super::prefetch,
};
