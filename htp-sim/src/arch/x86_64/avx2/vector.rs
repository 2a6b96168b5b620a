//! The portable vector functions, compiled for this tier's registers.

use crate::arch::portable::{vector, weights};
use crate::elementwise::{Activation, Unary};
use crate::kernels::{Peak, RowsMut, SoftmaxTotals};

#[target_feature(enable = "avx2,fma")]
pub(crate) fn softmax(scores: &mut [f32]) -> SoftmaxTotals {
    vector::softmax(scores)
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn log_scales(scales: &[[u8; 4]], logs: &mut [f32]) {
    weights::log_scales(scales, logs);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn peak(scores: &[f32], logs: &[f32]) -> Peak {
    weights::peak(scores, logs)
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn weight_scales(peaks: [&[f32]; 2], to: [&mut [f32]; 2]) {
    weights::weight_scales(peaks, to);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn soft_cap(x: &mut [f32], cap: f32) {
    vector::soft_cap(x, cap);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn sum_squares(x: &[f32]) -> f32 {
    vector::sum_squares(x)
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn normalize(x: &[f32], inv: f32, weight: &[f32], out: &mut [f32]) {
    vector::normalize(x, inv, weight, out);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn unary(function: Unary, x: &mut [f32]) {
    vector::unary(function, x);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn gate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    vector::gate(activation, gate, up);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn rotate(first: &mut [f32], second: &mut [f32], cos: &[f32], sin: &[f32]) {
    vector::rotate(first, second, cos, sin);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn add_row(values: &mut [f32], width: usize, row: &[f32], factor: f32) {
    vector::add_row(values, width, row, factor);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn store_rows(values: &[f32], width: usize, to: RowsMut<'_>) {
    vector::store_rows(values, width, to);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn merge_totals(totals: [&mut [f32]; 2], new: [&[f32]; 2], factors: [&mut [f32]; 2]) {
    vector::merge_totals(totals, new, factors);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn merge(acc: &mut [f32], part: &[f32], factors: [f32; 2]) {
    vector::merge(acc, part, factors);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn scale(x: &[f32], factor: f32, out: &mut [f32]) {
    vector::scale(x, factor, out);
}
