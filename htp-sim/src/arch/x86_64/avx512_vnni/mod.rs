//! avx512_vnni

use crate::arch::portable;
use crate::kernels::Kernels;

pub(crate) const KERNELS: Kernels = Kernels { name: "avx512_vnni", ..portable::KERNELS };
