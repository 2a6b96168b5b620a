//! A tile unit in plain Rust, with the rules of the real one: what the kernels do with tiles is tested on any CPU with
//! AVX-512, and a use of a register that the unit would refuse is a panic.

use super::insn::{Shapes, TileUnit};

pub(super) struct Emulated {
    shapes: Option<Shapes>,
    tiles: [[[u8; 64]; 16]; 8],
}

impl Default for Emulated {
    fn default() -> Self {
        Self { shapes: None, tiles: [[[0; 64]; 16]; 8] }
    }
}

impl Emulated {
    /// Rows of register `t` and bytes in each.
    fn shape(&self, t: usize) -> (usize, usize) {
        let shapes = self.shapes.expect("configured before use");
        let shape = (usize::from(shapes.rows[t]), usize::from(shapes.row_bytes[t]));
        assert!(shape.0 > 0 && shape.1 > 0 && shape.1.is_multiple_of(4), "register {t} has shape {shape:?}");
        shape
    }
}

impl TileUnit for Emulated {
    unsafe fn configure(&mut self, shapes: &Shapes) {
        self.shapes = Some(*shapes);
        // Not zeros: whoever relies on them is found out.
        self.tiles = [[[0x55; 64]; 16]; 8];
    }

    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
        let (rows, row_bytes) = self.shape(T);
        self.tiles[T] = [[0; 64]; 16];
        for row in 0..rows {
            // SAFETY: the caller's promise.
            let bytes = unsafe { std::slice::from_raw_parts(from.add(row * stride), row_bytes) };
            self.tiles[T][row][..row_bytes].copy_from_slice(bytes);
        }
    }

    unsafe fn zero<const T: usize>(&mut self) {
        self.shape(T);
        self.tiles[T] = [[0; 64]; 16];
    }

    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        let (c, a, b) = (self.shape(C), self.shape(A), self.shape(B));
        assert!(C != A && C != B && A != B, "registers {C}, {A}, {B}");
        assert_eq!((a.0, b.1, b.0 * 4), (c.0, c.1, a.1), "shapes {c:?}, {a:?}, {b:?}");
        for row in 0..c.0 {
            for column in 0..c.1 / 4 {
                let at = column * 4..column * 4 + 4;
                let mut sum = i32::from_le_bytes(self.tiles[C][row][at.clone()].try_into().expect("four bytes"));
                for k in 0..a.1 {
                    let b = self.tiles[B][k / 4][column * 4 + k % 4].cast_signed();
                    sum += i32::from(self.tiles[A][row][k].cast_signed()) * i32::from(b);
                }
                self.tiles[C][row][at].copy_from_slice(&sum.to_le_bytes());
            }
        }
    }

    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
        let (rows, row_bytes) = self.shape(T);
        for row in 0..rows {
            // SAFETY: the caller's promise.
            let bytes = unsafe { std::slice::from_raw_parts_mut(to.add(row * stride), row_bytes) };
            bytes.copy_from_slice(&self.tiles[T][row][..row_bytes]);
        }
    }

    unsafe fn release() {}
}
