//! From rows of floats or of codes to the packed layout, panel by panel.

use half::{bf16, f16};

use super::{BlockOffset, MAX_STEP, PANEL, PackedLayout, WeightFormat, code_places};
use crate::error::{Needed, ShapeError, expect_len};

/// Where zero lies, as given to [`pack_quantized`]; must suit the layout's [`BlockOffset`].
#[derive(Debug, Clone, Copy)]
pub enum Offsets<'a> {
    /// Symmetric formats.
    None,
    /// [`BlockOffset::Integer`]: row-major `[n, k/block]`.
    Integer(&'a [i8]),
    /// [`BlockOffset::Min`]: row-major `[n, k/block]`, rounded to f16 here.
    Min(&'a [f32]),
    /// [`WeightFormat::Int4Expansion`]: row-major `[n, k/block]`, each 1 to [`MAX_STEP`].
    Steps(&'a [u8]),
}

/// Rounds `value` to the nearest f16, or says that f16 cannot hold it (not finite, or too large).
///
/// Block scales and minima are stored as f16: a quantizer calls this first and chooses its codes for the rounded scale.
pub fn round_to_f16(value: f32) -> Option<f32> {
    let rounded = f16::from_f32(value);
    rounded.is_finite().then(|| rounded.to_f32())
}

/// Packs `values`, row-major `[n, k]`, into a float format.
///
/// # Errors
/// [`ShapeError`] if the layout is not a float format, the length differs, or a value is not finite in the format.
pub fn pack_float(layout: &PackedLayout, values: &[f32]) -> Result<Vec<u8>, ShapeError> {
    expect_len("weights", values.len(), layout.n * layout.k)?;
    let mut blob = vec![0; layout.size_bytes()];
    let mut packer = Packer::new(*layout, &mut blob)?;
    for (panel, rows) in values.chunks(PANEL * layout.k).enumerate() {
        packer.float_panel(panel, rows)?;
    }
    Ok(blob)
}

/// Packs quantized weights.
///
/// `codes` is row-major `[n, k]`, of the format's [`codes`](WeightFormat::codes). `scales` is `[n]` for the per-channel
/// formats and row-major `[n, k/block]` for the block formats, where they are rounded to f16.
///
/// # Errors
/// [`ShapeError`] if the layout is a float format, a length differs, `offsets` is of another kind than the layout's, a
/// code is outside those of the format, or a scale or minimum is not finite in its format.
pub fn pack_quantized(
    layout: &PackedLayout,
    codes: &[i8],
    scales: &[f32],
    offsets: Offsets<'_>,
) -> Result<Vec<u8>, ShapeError> {
    expect_len("codes", codes.len(), layout.n * layout.k)?;
    expect_len("scales", scales.len(), layout.n * layout.blocks())?;
    let mut blob = vec![0; layout.size_bytes()];
    let mut packer = Packer::new(*layout, &mut blob)?;
    let per_panel = PANEL * layout.blocks();
    for (panel, codes) in codes.chunks(PANEL * layout.k).enumerate() {
        let at = panel * per_panel;
        let end = scales.len().min(at + per_panel);
        let offsets = match offsets {
            Offsets::None => Offsets::None,
            Offsets::Integer(all) => {
                expect_len("offsets", all.len(), scales.len())?;
                Offsets::Integer(&all[at..end])
            }
            Offsets::Min(all) => {
                expect_len("minima", all.len(), scales.len())?;
                Offsets::Min(&all[at..end])
            }
            Offsets::Steps(all) => {
                expect_len("steps", all.len(), layout.n * layout.steps())?;
                let per_panel = PANEL * layout.steps();
                Offsets::Steps(&all[panel * per_panel..all.len().min((panel + 1) * per_panel)])
            }
        };
        packer.quantized_panel(panel, codes, &scales[at..end], offsets)?;
    }
    Ok(blob)
}

/// Fills a blob one panel (16 rows) at a time, so that a large matrix never has to be in memory as floats.
#[derive(Debug)]
pub struct Packer<'a> {
    layout: PackedLayout,
    blob: &'a mut [u8],
}

impl<'a> Packer<'a> {
    /// A packer that writes to `blob`, of exactly `layout.size_bytes()` bytes. `blob` is cleared.
    ///
    /// # Errors
    /// [`ShapeError`] if the length differs.
    pub fn new(layout: PackedLayout, blob: &'a mut [u8]) -> Result<Self, ShapeError> {
        expect_len("bytes of packed weights", blob.len(), layout.size_bytes())?;
        blob.fill(0);
        Ok(Self { layout, blob })
    }

    /// Packs the rows of panel `panel`: `rows` is `[16, k]`, or what is left of `n` in the last panel.
    ///
    /// # Errors
    /// As [`pack_float`]; the panel may then be written in part.
    pub fn float_panel(&mut self, panel: usize, rows: &[f32]) -> Result<(), ShapeError> {
        let k = self.layout.k;
        expect_len("weights of a panel", rows.len(), self.rows_of(panel)? * k)?;
        let width = self.layout.width(panel);
        let codes = &mut self.blob[panel * self.layout.panel_code_bytes()..];
        for (i, &value) in rows.iter().enumerate() {
            let at = i % k * width + i / k;
            let finite = match self.layout.format {
                WeightFormat::F32 => {
                    codes[at * 4..at * 4 + 4].copy_from_slice(&value.to_le_bytes());
                    value.is_finite()
                }
                WeightFormat::F16 => {
                    let value = f16::from_f32(value);
                    codes[at * 2..at * 2 + 2].copy_from_slice(&value.to_le_bytes());
                    value.is_finite()
                }
                WeightFormat::Bf16 => {
                    let value = bf16::from_f32(value);
                    codes[at * 2..at * 2 + 2].copy_from_slice(&value.to_le_bytes());
                    value.is_finite()
                }
                _ => return Err(ShapeError::new("panel of floats", panel, Needed::Rule("a float weight format"))),
            };
            if !finite {
                let row = panel * PANEL + i / k;
                return Err(ShapeError::new("weight in row", row, Needed::Rule("values that the format can hold")));
            }
        }
        Ok(())
    }

    /// Packs the rows of panel `panel`: `codes` is `[16, k]`, `scales` `[16]` or `[16, k/block]`, offsets likewise; or what
    /// is left of `n` in the last panel.
    ///
    /// # Errors
    /// As [`pack_quantized`]; the panel may then be written in part.
    pub fn quantized_panel(
        &mut self,
        panel: usize,
        codes: &[i8],
        scales: &[f32],
        offsets: Offsets<'_>,
    ) -> Result<(), ShapeError> {
        let rows = self.rows_of(panel)?;
        if self.layout.format.is_float() {
            return Err(ShapeError::new("panel of codes", panel, Needed::Rule("an integer weight format")));
        }
        expect_len("codes of a panel", codes.len(), rows * self.layout.k)?;
        expect_len("scales of a panel", scales.len(), rows * self.layout.blocks())?;
        self.write_codes(panel, codes)?;
        self.write_scales(panel, scales)?;
        self.write_offsets(panel, rows, offsets)
    }

    fn rows_of(&self, panel: usize) -> Result<usize, ShapeError> {
        if panel >= self.layout.panels() {
            return Err(ShapeError::new("panel", panel, Needed::AtMost(self.layout.panels() - 1)));
        }
        Ok(PANEL.min(self.layout.n - panel * PANEL))
    }

    fn write_codes(&mut self, panel: usize, codes: &[i8]) -> Result<(), ShapeError> {
        let (k, width, bytes) = (self.layout.k, self.layout.width(panel), self.layout.panel_code_bytes());
        let panel_codes = &mut self.blob[panel * bytes..][..bytes / PANEL * width];
        let format = self.layout.format;
        if format.bits() == 8 {
            for (i, &code) in codes.iter().enumerate() {
                let (row, k) = (i / k, i % k);
                panel_codes[(k / 4 * width + row) * 4 + k % 4] = code.cast_unsigned();
            }
            return Ok(());
        }
        if let Some(at) = codes.iter().position(|code| !format.codes().contains(code)) {
            let (what, rule) = match format.bits() {
                4 => ("4-bit code in row", "codes from 0 to 15"),
                5 => ("5-bit code in row", "codes from 0 to 31"),
                _ => ("6-bit code in row", "codes from 0 to 63"),
            };
            return Err(ShapeError::new(what, panel * PANEL + at / k, Needed::Rule(rule)));
        }
        panel_codes.fill(0);
        for row in 0..width {
            let codes = codes.chunks_exact(k).nth(row).unwrap_or(&[]);
            for group in 0..self.layout.k_padded() / 4 {
                let places = code_places(group, format.bits() - 4);
                for i in 0..4 {
                    // Rows and inputs that only fill up mean 0.
                    let code = codes.get(group * 4 + i).map_or(format.zero_code(), |code| *code).cast_unsigned();
                    for (place, part) in places.into_iter().zip([code & 15, code >> 4]) {
                        panel_codes[(place.row * width + row) * 4 + i] |= part << place.shift;
                    }
                }
            }
        }
        Ok(())
    }

    fn write_scales(&mut self, panel: usize, scales: &[f32]) -> Result<(), ShapeError> {
        let (blocks, bytes) = (self.layout.blocks(), self.layout.panel_scale_bytes());
        let section = &mut self.blob[self.layout.sections.scales_at + panel * bytes..][..bytes];
        if self.layout.format.block().is_some() {
            return write_f16(section, scales, blocks, "block scale in row of panel");
        }
        for (row, scale) in scales.iter().enumerate() {
            if !scale.is_finite() {
                return Err(ShapeError::new("scale of row", panel * PANEL + row, Needed::Rule("a finite scale")));
            }
            section[row * 4..row * 4 + 4].copy_from_slice(&scale.to_le_bytes());
        }
        Ok(())
    }

    fn write_offsets(&mut self, panel: usize, rows: usize, offsets: Offsets<'_>) -> Result<(), ShapeError> {
        let (count, steps) = (rows * self.layout.blocks(), self.layout.steps());
        let (blocks, bytes) = (self.layout.blocks(), self.layout.panel_offset_bytes());
        let section = &mut self.blob[self.layout.sections.offsets_at + panel * bytes..][..bytes];
        match (self.layout.format.block_offset(), offsets) {
            (BlockOffset::Symmetric, Offsets::Steps(values)) if steps > 0 => {
                expect_len("steps of a panel", values.len(), rows * steps)?;
                for (i, &step) in values.iter().enumerate() {
                    if !(1..=MAX_STEP).contains(&step) {
                        let row = panel * PANEL + i / steps;
                        return Err(ShapeError::new("step in row", row, Needed::Rule("steps from 1 to 16")));
                    }
                    section[i % steps * PANEL + i / steps] = step;
                }
                Ok(())
            }
            (BlockOffset::Symmetric, Offsets::None) if steps == 0 => Ok(()),
            (BlockOffset::Integer, Offsets::Integer(offsets)) => {
                expect_len("offsets of a panel", offsets.len(), count)?;
                for (i, &offset) in offsets.iter().enumerate() {
                    section[i % blocks * PANEL + i / blocks] = offset.cast_unsigned();
                }
                Ok(())
            }
            (BlockOffset::Min, Offsets::Min(minima)) => {
                expect_len("minima of a panel", minima.len(), count)?;
                write_f16(section, minima, blocks, "block minimum in row of panel")
            }
            _ => Err(ShapeError::new("panel", panel, Needed::Rule("offsets of the layout's own kind"))),
        }
    }
}

/// Transposes `values`, `[rows, blocks]`, to `[blocks][16]` f16.
fn write_f16(section: &mut [u8], values: &[f32], blocks: usize, what: &'static str) -> Result<(), ShapeError> {
    for (i, &value) in values.iter().enumerate() {
        let rounded = f16::from_f32(value);
        if !rounded.is_finite() {
            return Err(ShapeError::new(what, i / blocks, Needed::Rule("values that f16 can hold")));
        }
        let at = (i % blocks * PANEL + i / blocks) * 2;
        section[at..at + 2].copy_from_slice(&rounded.to_le_bytes());
    }
    Ok(())
}
