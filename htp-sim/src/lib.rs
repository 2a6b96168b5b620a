//! The kernels: quantized matmul, attention, norms, one table per instruction set.
