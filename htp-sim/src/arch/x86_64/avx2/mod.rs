//! avx2

use crate::arch::portable;
use crate::kernels::Kernels;

pub(crate) const KERNELS: Kernels = Kernels { name: "avx2", ..portable::KERNELS };
