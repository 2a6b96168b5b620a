//! Plain Rust for any CPU.

pub(crate) mod attention;
pub(crate) mod matmul;
pub(crate) mod vector;
pub(crate) mod weights;

use crate::kernels::Kernels;

pub(crate) const KERNELS: Kernels = Kernels {
    name: "portable",
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
    log_scales: weights::log_scales,
    peak: weights::peak,
    weight_scales: weights::weight_scales,
    weigh: weights::weigh,
    soft_cap: vector::soft_cap,
    sum_squares: vector::sum_squares,
    normalize: vector::normalize,
    quantize: vector::quantize,
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
    prefetch: |_| (),
};
