//! The instructions of the tile unit, which stable Rust has no intrinsics for.

use std::arch::asm;
use std::cell::Cell;

/// A tile unit: eight registers of up to 16 rows of 64 bytes.
///
/// The values stay in the registers from one call to the next. They belong to the thread; the compiler never uses them.
pub(super) trait TileUnit: Default {
    /// Sets the shape of every register (`ldtilecfg`), unless the last call on this thread has. What they hold is then not defined.
    ///
    /// # Safety
    /// The CPU has the unit, and the system permits its use. This holds for all functions here.
    unsafe fn configure(&mut self, shapes: &Shapes);

    /// Loads register `T`, its rows `stride` bytes apart (`tileloadd`).
    ///
    /// # Safety
    /// As [`configure`](Self::configure), which has given `T` a shape, and every row of it can be read.
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize);

    /// Clears register `T` (`tilezero`).
    ///
    /// # Safety
    /// As [`configure`](Self::configure), which has given `T` a shape.
    unsafe fn zero<const T: usize>(&mut self);

    /// Adds to the i32 of register `C` the products of the signed bytes of `A` and `B` (`tdpbssd`).
    ///
    /// # Safety
    /// As [`load`](Self::load) for the shapes of all three. `A` has the rows of `C`, `B` its columns, and `B` has one row for each four
    /// bytes of a row of `A`.
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self);

    /// Stores register `T`, its rows `stride` bytes apart (`tilestored`).
    ///
    /// # Safety
    /// As [`configure`](Self::configure), which has given `T` a shape, and every row of it can be written.
    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize);

    /// Gives this thread's registers back (`tilerelease`), if it has any: the system need not save them any more, and other code
    /// may shape them.
    ///
    /// # Safety
    /// As [`configure`](Self::configure).
    unsafe fn release();
}

/// Rows of each register, and bytes in its rows: the 64 bytes that `ldtilecfg` reads.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub(super) struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    pub(super) row_bytes: [u16; 16],
    pub(super) rows: [u8; 16],
}

impl Shapes {
    /// Shapes of registers 0 to 7 as (rows, bytes in a row).
    pub(super) fn new(registers: [(usize, usize); 8]) -> Self {
        let mut shapes = Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, (rows, row_bytes)) in registers.into_iter().enumerate() {
            assert!(rows <= 16 && row_bytes <= 64, "a tile of {rows} rows of {row_bytes} bytes");
            (shapes.rows[i], shapes.row_bytes[i]) = (rows as u8, row_bytes as u16);
        }
        shapes
    }
}

const _: () = assert!(size_of::<Shapes>() == 64);

/// The unit of this CPU.
#[derive(Debug, Default)]
pub(super) struct Hardware;

thread_local! {
    /// The shapes that this thread's registers have. From `configure` to `release` nothing runs here but the tiles of one
    /// parallel region, so nobody else changes them.
    static SHAPES: Cell<Option<Shapes>> = const { Cell::new(None) };
}

/// `$do!("tmm0")` or another register, as the number says.
macro_rules! with_register {
    ($number:expr, $do:ident) => {
        match $number {
            0 => $do!("tmm0"),
            1 => $do!("tmm1"),
            2 => $do!("tmm2"),
            3 => $do!("tmm3"),
            4 => $do!("tmm4"),
            5 => $do!("tmm5"),
            6 => $do!("tmm6"),
            7 => $do!("tmm7"),
            _ => unreachable!("the unit has eight registers"),
        }
    };
}

impl TileUnit for Hardware {
    #[inline]
    unsafe fn configure(&mut self, shapes: &Shapes) {
        // Shaping them for each tile of a product anew cost a prompt of 128 a tenth of its time.
        if SHAPES.get().as_ref() == Some(shapes) {
            return;
        }
        SHAPES.set(Some(*shapes));
        // SAFETY: the caller's promise. `shapes` is a reference to the 64 bytes that are read; without `readonly` or
        // `nomem` the compiler takes the block to read all memory.
        unsafe { asm!("ldtilecfg [{}]", in(reg) std::ptr::from_ref(shapes), options(nostack, preserves_flags)) }
    }

    #[inline]
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
        macro_rules! tileload {
            ($register:tt) => {
                // SAFETY: the caller's promise.
                unsafe {
                    asm!(concat!("tileloadd ", $register, ", [{from} + {stride}*1]"), from = in(reg) from,
                        stride = in(reg) stride, options(nostack, readonly, preserves_flags))
                }
            };
        }
        with_register!(T, tileload)
    }

    #[inline]
    unsafe fn zero<const T: usize>(&mut self) {
        macro_rules! tilezero {
            ($register:tt) => {
                // SAFETY: the caller's promise.
                unsafe { asm!(concat!("tilezero ", $register), options(nostack, nomem, preserves_flags)) }
            };
        }
        with_register!(T, tilezero)
    }

    #[inline]
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        macro_rules! tdpbssd {
            ($c:tt, $a:tt, $b:tt) => {
                // SAFETY: the caller's promise.
                unsafe { asm!(concat!("tdpbssd ", $c, ", ", $a, ", ", $b), options(nostack, nomem, preserves_flags)) }
            };
        }
        // Only these are used: sums in 0 to 3, operands in the others.
        match (C, A, B) {
            (0, 4, 6) => tdpbssd!("tmm0", "tmm4", "tmm6"),
            (1, 4, 7) => tdpbssd!("tmm1", "tmm4", "tmm7"),
            (1, 5, 6) => tdpbssd!("tmm1", "tmm5", "tmm6"),
            (2, 4, 6) => tdpbssd!("tmm2", "tmm4", "tmm6"),
            (2, 4, 7) => tdpbssd!("tmm2", "tmm4", "tmm7"),
            (2, 5, 6) => tdpbssd!("tmm2", "tmm5", "tmm6"),
            (3, 4, 7) => tdpbssd!("tmm3", "tmm4", "tmm7"),
            (3, 5, 6) => tdpbssd!("tmm3", "tmm5", "tmm6"),
            (3, 5, 7) => tdpbssd!("tmm3", "tmm5", "tmm7"),
            _ => unreachable!("no kernel uses these registers together"),
        }
    }

    #[inline]
    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
        macro_rules! tilestore {
            ($register:tt) => {
                // SAFETY: the caller's promise.
                unsafe {
                    asm!(concat!("tilestored [{to} + {stride}*1], ", $register), to = in(reg) to,
                        stride = in(reg) stride, options(nostack, preserves_flags))
                }
            };
        }
        with_register!(T, tilestore)
    }

    #[inline]
    unsafe fn release() {
        if SHAPES.take().is_some() {
            // SAFETY: the caller's promise.
            unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
        }
    }
}
