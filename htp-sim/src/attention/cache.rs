//! The KV cache, range by range of 256 positions: for each KV head a block with its keys in panels of 16 positions, and its values
//! in rows or in panels of 16 of a head's values.
//!
//! - F32, F16: keys `[position/16][head_dim][16]`, values `[position][head_dim]`.
//! - Int8: i8 keys `[position/16][head_dim/4][16][4]`, their f32 scales `[position]`, the values' f32 scales `[position]`, i8 values
//!   `[head_dim/16][position/4][16][4]`.
//!
//! So keys are packed weights with an output for each position, and int8 values packed weights with an input for each position:
//! the products of both are those of a linear layer. `head_dim` is padded to 4 in int8 keys and to 16 in int8 values.
//!
//! A block lies in this order, which is that of reading: what comes next has been asked for.
//!
//! Ranges are [`CacheLayout::range_stride`] bytes apart. Layers whose ranges take turns in one memory touch it from its start as
//! positions are written, so that large pages cost little more than small ones.

use std::ops::Range;

use half::f16;

use super::RANGE;
use crate::Cx;
use crate::error::{Needed, ShapeError, expect_at_most, expect_len, size};
use crate::kernels::{Kernels, QuantizedRowMut, RowValues};
use crate::packed::PANEL;
use crate::scratch::{Disjoint, LINE_BYTES};

/// How the cache's elements are stored.
///
/// In the float formats a value that is not finite reaches more rows than those that see it; see
/// [`attention`](super::attention).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CacheFormat {
    /// 32-bit floats.
    F32,
    /// IEEE half floats; what is too large becomes infinite.
    F16,
    /// Symmetric i8 with one f32 scale per KV head and position (`absmax / 127` of the row).
    Int8,
}

impl CacheFormat {
    /// Bytes of an element.
    pub const fn element_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
            Self::Int8 => 1,
        }
    }
}

/// The shape and format of one layer's cache, with every size checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheLayout {
    kv_heads: usize,
    head_dim: usize,
    capacity: usize,
    format: CacheFormat,
    range_stride: usize,
}

impl CacheLayout {
    /// A cache of `kv_heads` heads of `head_dim` values for `capacity` positions.
    ///
    /// # Errors
    /// [`ShapeError`] if a number is 0, `head_dim` is above [`MAX_HEAD_DIM`], or the bytes would not fit in memory.
    pub fn new(kv_heads: usize, head_dim: usize, capacity: usize, format: CacheFormat) -> Result<Self, ShapeError> {
        let smallest = kv_heads.min(head_dim).min(capacity);
        if smallest == 0 {
            return Err(ShapeError::new("smallest side of a cache", 0, Needed::AtLeast(1)));
        }
        expect_at_most("values of a head", head_dim, MAX_HEAD_DIM)?;
        let positions = capacity.saturating_add(RANGE);
        size("bytes of a cache", &[kv_heads, positions, head_dim.next_multiple_of(PANEL) + 4, 8])?;
        let layout = Self { kv_heads, head_dim, capacity, format, range_stride: 0 };
        Ok(Self { range_stride: layout.range_bytes(), ..layout })
    }

    /// The same with ranges `stride` bytes apart.
    ///
    /// # Errors
    /// [`ShapeError`] if that is less than a range has, no multiple of a cache line, or the bytes would not fit in memory.
    pub fn with_range_stride(self, stride: usize) -> Result<Self, ShapeError> {
        let refused = |needed| Err(ShapeError::new("bytes between ranges of a cache", stride, needed));
        if stride < self.range_bytes() {
            return refused(Needed::AtLeast(self.range_bytes()));
        }
        if !stride.is_multiple_of(LINE_BYTES) {
            return refused(Needed::MultipleOf(LINE_BYTES));
        }
        size("bytes of a cache", &[stride, self.ranges()])?;
        Ok(Self { range_stride: stride, ..self })
    }

    /// KV heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Values of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Positions.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How the elements are stored.
    pub fn format(&self) -> CacheFormat {
        self.format
    }

    /// Bytes from the first to the last, with what lies between the ranges.
    pub fn size_bytes(&self) -> usize {
        (self.ranges() - 1) * self.range_stride + self.range_bytes()
    }

    /// Bytes that a position takes, on the average of a range.
    pub fn position_bytes(&self) -> usize {
        self.range_bytes() / RANGE
    }

    /// Bytes of 256 positions.
    pub fn range_bytes(&self) -> usize {
        self.kv_heads * self.block_bytes()
    }

    /// Bytes from the start of a range to that of the next.
    pub fn range_stride(&self) -> usize {
        self.range_stride
    }

    /// Ranges of 256 positions.
    pub fn ranges(&self) -> usize {
        self.capacity.div_ceil(RANGE)
    }

    /// Bytes of 16 positions of one head's keys.
    pub(crate) fn key_panel_bytes(&self) -> usize {
        PANEL * self.key_head_dim() * self.format.element_bytes()
    }

    /// `head_dim` as the keys store it.
    pub(crate) fn key_head_dim(&self) -> usize {
        if self.format == CacheFormat::Int8 { self.head_dim.next_multiple_of(4) } else { self.head_dim }
    }

    /// `head_dim` as the values store it.
    pub(crate) fn value_head_dim(&self) -> usize {
        if self.format == CacheFormat::Int8 { self.head_dim.next_multiple_of(PANEL) } else { self.head_dim }
    }

    /// Where the block of `head` with `position` starts.
    fn block_at(&self, head: usize, position: usize) -> usize {
        position / RANGE * self.range_stride + head * self.block_bytes()
    }

    fn block_bytes(&self) -> usize {
        self.block_key_bytes() + self.block_value_bytes() + 2 * self.block_scale_bytes()
    }

    fn block_key_bytes(&self) -> usize {
        RANGE / PANEL * self.key_panel_bytes()
    }

    fn block_value_bytes(&self) -> usize {
        RANGE * self.value_head_dim() * self.format.element_bytes()
    }

    fn block_scale_bytes(&self) -> usize {
        RANGE * self.scale_bytes()
    }

    /// Bytes of a position's scale.
    fn scale_bytes(&self) -> usize {
        if self.format == CacheFormat::Int8 { 4 } else { 0 }
    }
}

/// One layer's cache, borrowed for reading.
#[derive(Debug, Clone, Copy)]
pub struct Cache<'a> {
    /// Shape and format.
    pub layout: CacheLayout,
    /// [`CacheLayout::size_bytes`] bytes.
    pub bytes: &'a [u8],
}

impl<'a> Cache<'a> {
    /// The key panels of `head` from position `from` (a multiple of 16) to the end of its range, and more.
    pub(crate) fn keys(&self, head: usize, from: usize) -> &'a [u8] {
        self.of_block(head, from, 0, from % RANGE / PANEL * self.layout.key_panel_bytes())
    }

    /// The f32 scales of the keys of `head` from position `from` on, likewise; without meaning for float formats.
    pub(crate) fn key_scales(&self, head: usize, from: usize) -> &'a [u8] {
        let layout = &self.layout;
        self.of_block(head, from, layout.block_key_bytes(), from % RANGE * layout.scale_bytes())
    }

    /// The values of `head` from position `from` on, likewise, in the float formats.
    pub(crate) fn value_rows(&self, head: usize, from: usize) -> &'a [u8] {
        self.values(head, from, from % RANGE * self.layout.head_dim * self.layout.format.element_bytes())
    }

    /// The first value panel of `head` in the range of position `from`, from that position (a multiple of 4) on; int8 only.
    pub(crate) fn value_panels(&self, head: usize, from: usize) -> &'a [u8] {
        self.values(head, from, from % RANGE * PANEL)
    }

    /// The f32 scales of the values of `head` from position `from` on, likewise; without meaning for float formats.
    pub(crate) fn value_scales(&self, head: usize, from: usize) -> &'a [u8] {
        let layout = &self.layout;
        let part = layout.block_key_bytes() + layout.block_scale_bytes();
        self.of_block(head, from, part, from % RANGE * layout.scale_bytes())
    }

    /// Asks for the values of `head` at some positions of one range, int8 only. Of a whole range it asks for their scales alone: the
    /// kernel that multiplies few rows by the keys asks for the rest, as far from what it reads as this says, in bytes.
    pub(super) fn ask_for_values(&self, kernels: &Kernels, head: usize, positions: Range<usize>) -> isize {
        let layout = &self.layout;
        if layout.format != CacheFormat::Int8 {
            return 0;
        }
        (kernels.prefetch)(&self.value_scales(head, positions.start)[..positions.len() * layout.scale_bytes()]);
        if positions.len() == RANGE {
            return (layout.block_bytes() - layout.block_value_bytes()).cast_signed();
        }
        let panels =
            self.value_panels(head, positions.start).chunks(RANGE * PANEL).take(layout.value_head_dim() / PANEL);
        panels.for_each(|panel| (kernels.prefetch)(&panel[..positions.len() * PANEL]));
        0
    }

    /// The same for keys, those of the second of two blocks, which are a KV head and a range each; the kernel is that for the values of the
    /// first.
    pub(super) fn ask_for_keys(
        &self,
        kernels: &Kernels,
        blocks: [(usize, usize); 2],
        positions: Range<usize>,
    ) -> isize {
        let (layout, (head, _)) = (&self.layout, blocks[1]);
        if layout.format != CacheFormat::Int8 || positions.is_empty() {
            return 0;
        }
        (kernels.prefetch)(&self.key_scales(head, positions.start)[..positions.len() * layout.scale_bytes()]);
        if positions.len() == RANGE {
            let [from, to] = blocks.map(|(head, range)| layout.block_at(head, range * RANGE).cast_signed());
            return to - from - (layout.block_bytes() - layout.block_value_bytes()).cast_signed();
        }
        let bytes = positions.len() / PANEL * layout.key_panel_bytes();
        (kernels.prefetch)(&self.keys(head, positions.start)[..bytes]);
        0
    }

    fn values(&self, head: usize, position: usize, at: usize) -> &'a [u8] {
        self.of_block(head, position, self.layout.block_bytes() - self.layout.block_value_bytes(), at)
    }

    fn of_block(&self, head: usize, position: usize, part: usize, at: usize) -> &'a [u8] {
        &self.bytes[self.layout.block_at(head, position) + part + at..]
    }
}

/// One layer's cache, borrowed for writing.
#[derive(Debug)]
pub struct CacheMut<'a> {
    /// Shape and format.
    pub layout: CacheLayout,
    /// [`CacheLayout::size_bytes`] bytes.
    pub bytes: &'a mut [u8],
}

impl CacheMut<'_> {
    /// The same cache for reading.
    pub fn as_ref(&self) -> Cache<'_> {
        Cache { layout: self.layout, bytes: self.bytes }
    }
}

/// Asks for the memory around position `at` that [`append`] will write and [`attention`](super::attention) read. A decode
/// step goes through more weights than the caches hold between two visits of a layer: what it wrote last is far away.
///
/// A hint: it changes nothing, and does nothing for a position beyond the capacity or a cache of another length.
pub fn prefetch(cx: &Cx<'_>, cache: &Cache<'_>, at: usize) {
    let layout = cache.layout;
    if cache.bytes.len() != layout.size_bytes() || at >= layout.capacity {
        return;
    }
    let ask = |bytes: &[u8], len: usize| (cx.kernels.prefetch)(&bytes[..len.min(bytes.len())]);
    for head in 0..layout.kv_heads {
        ask(cache.keys(head, at), layout.key_panel_bytes());
        if layout.format == CacheFormat::Int8 {
            ask(cache.key_scales(head, at), 4);
            ask(cache.value_scales(head, at), 4);
            let panels = cache.value_panels(head, at / 4 * 4);
            for panel in 0..layout.value_head_dim() / PANEL {
                ask(&panels[panel * RANGE * PANEL..], 4 * PANEL);
            }
        } else {
            ask(cache.value_rows(head, at), layout.head_dim * layout.format.element_bytes());
        }
    }
}

/// Writes the rows of `k` and `v`, each `[m, kv_heads · head_dim]`, in place at the positions `at..at + m`.
///
/// A row with a NaN or an infinity gets the scale NaN in an int8 cache.
///
/// # Errors
/// [`ShapeError`] if a length does not match or `at + m` is beyond the capacity. The cache is then unchanged.
pub fn append(cx: &Cx<'_>, cache: &mut CacheMut<'_>, at: usize, k: &[f32], v: &[f32]) -> Result<(), ShapeError> {
    let layout = cache.layout;
    expect_len("bytes of the cache", cache.bytes.len(), layout.size_bytes())?;
    let width = layout.kv_heads * layout.head_dim;
    if !k.len().is_multiple_of(width) {
        return Err(ShapeError::new("length of k", k.len(), Needed::MultipleOf(width)));
    }
    expect_len("length of v", v.len(), k.len())?;
    let m = k.len() / width;
    expect_at_most("positions after this step", at.saturating_add(m), layout.capacity)?;

    let bytes = Disjoint::new(cache.bytes);
    let append_head = |head: usize, codes: &mut Codes| {
        let mut row = 0;
        while row < m {
            let (position, from) = (at + row, row * width + head * layout.head_dim);
            let rows = (m - row).min(RANGE - position % RANGE);
            // SAFETY: each head is one item, and its blocks are its own.
            let block = unsafe { bytes.range(layout.block_at(head, position), layout.block_bytes()) };
            let mut block = BlockMut::new(cx.kernels, layout, block, codes);
            block.write(position % RANGE, rows, width, &k[from..], &v[from..]);
            row += rows;
        }
    };
    if k.len() < PARALLEL_VALUES {
        let mut codes = NO_CODES;
        (0..layout.kv_heads).for_each(|head| append_head(head, &mut codes));
    } else {
        cx.workers.for_each(layout.kv_heads, |head, _| append_head(head, &mut { NO_CODES }));
    }
    Ok(())
}

/// One head's part of a range.
struct BlockMut<'a> {
    layout: CacheLayout,
    kernels: &'static Kernels,
    keys: &'a mut [u8],
    key_scales: &'a mut [u8],
    values: &'a mut [u8],
    value_scales: &'a mut [u8],
    /// Int8: rows on their way.
    codes: &'a mut Codes,
}

impl<'a> BlockMut<'a> {
    fn new(kernels: &'static Kernels, layout: CacheLayout, block: &'a mut [u8], codes: &'a mut Codes) -> Self {
        let (keys, block) = block.split_at_mut(layout.block_key_bytes());
        let (key_scales, block) = block.split_at_mut(layout.block_scale_bytes());
        let (value_scales, values) = block.split_at_mut(layout.block_scale_bytes());
        Self { layout, kernels, keys, key_scales, values, value_scales, codes }
    }

    /// Writes `rows` rows from position `at` of the range on, `stride` apart in `k` and `v`.
    fn write(&mut self, at: usize, rows: usize, stride: usize, k: &[f32], v: &[f32]) {
        let mut row = 0;
        while row < rows {
            let from = row * stride;
            // In an int8 cache those of a whole group at once.
            let is_group = self.layout.format == CacheFormat::Int8 && (at + row).is_multiple_of(GROUP);
            let n = if is_group && rows - row >= GROUP { GROUP } else { 1 };
            self.write_rows(at + row, n, stride, &k[from..], &v[from..]);
            row += n;
        }
    }

    /// Writes one row, or all of a group.
    fn write_rows(&mut self, at: usize, rows: usize, stride: usize, k: &[f32], v: &[f32]) {
        let head_dim = self.layout.head_dim;
        match self.layout.format {
            CacheFormat::F32 => self.write_floats(at, &k[..head_dim], &v[..head_dim], |x| x.to_le_bytes()),
            CacheFormat::F16 => {
                self.write_floats(at, &k[..head_dim], &v[..head_dim], |x| f16::from_f32(x).to_le_bytes())
            }
            CacheFormat::Int8 => {
                for row in 0..rows {
                    self.write_int8_key(at + row, &k[row * stride..][..head_dim]);
                }
                self.write_int8_values(at, rows, stride, v);
            }
        }
    }

    fn write_floats<const BYTES: usize>(
        &mut self,
        at: usize,
        k: &[f32],
        v: &[f32],
        bytes: impl Fn(f32) -> [u8; BYTES],
    ) {
        let panel_bytes = self.layout.key_panel_bytes();
        let panel = self.keys[at / PANEL * panel_bytes..][..panel_bytes].as_chunks_mut().0;
        panel.iter_mut().skip(at % PANEL).step_by(PANEL).zip(k).for_each(|(to, k)| *to = bytes(*k));
        let row = self.values[at * v.len() * BYTES..][..v.len() * BYTES].as_chunks_mut().0;
        row.iter_mut().zip(v).for_each(|(to, v)| *to = bytes(*v));
    }

    fn write_int8_key(&mut self, at: usize, k: &[f32]) {
        let scale = quantize(self.kernels, k, &mut self.codes[0]);
        let panel_bytes = self.layout.key_panel_bytes();
        let panel = &mut self.keys[at / PANEL * panel_bytes..][..panel_bytes];
        let groups = panel.as_chunks_mut::<GROUP>().0.iter_mut().skip(at % PANEL).step_by(PANEL);
        // What pads a row to whole groups is zeros.
        self.codes[0][k.len()..k.len().next_multiple_of(GROUP)].fill(0);
        for (to, codes) in groups.zip(self.codes[0].as_chunks::<GROUP>().0) {
            *to = codes.map(i8::cast_unsigned);
        }
        self.key_scales[at * 4..][..4].copy_from_slice(&scale.to_le_bytes());
    }

    /// The rows of a whole group meet in each four bytes; a single row has one of them.
    fn write_int8_values(&mut self, at: usize, rows: usize, stride: usize, v: &[f32]) {
        let head_dim = self.layout.head_dim;
        for (row, codes) in self.codes.iter_mut().take(rows).enumerate() {
            let scale = quantize(self.kernels, &v[row * stride..][..head_dim], codes);
            self.value_scales[(at + row) * 4..][..4].copy_from_slice(&scale.to_le_bytes());
        }
        for (first, panel) in (0..head_dim).step_by(PANEL).zip(self.values.chunks_exact_mut(RANGE * PANEL)) {
            let columns = first..head_dim.min(first + PANEL);
            let groups = panel[at / GROUP * GROUP * PANEL..].as_chunks_mut::<GROUP>().0;
            let [a, b, c, d] = self.codes.each_ref().map(|codes| &codes[columns.clone()]);
            if rows == GROUP {
                for (((to, a), (b, c)), d) in groups.iter_mut().zip(a).zip(b.iter().zip(c)).zip(d) {
                    *to = [*a, *b, *c, *d].map(i8::cast_unsigned);
                }
            } else {
                groups.iter_mut().zip(a).for_each(|(to, code)| to[at % GROUP] = code.cast_unsigned());
            }
        }
    }
}

/// Quantizes one head's row to 8 bits; returns its scale.
fn quantize(kernels: &Kernels, x: &[f32], codes: &mut [i8; MAX_HEAD_DIM]) -> f32 {
    let (mut scale, mut sum, mut plane_sums) = (0.0, 0, [0; 2]);
    let target = QuantizedRowMut {
        hi: &mut codes[..x.len()],
        lo: &mut [],
        scale: &mut scale,
        sums: std::slice::from_mut(&mut sum),
        sum_block: x.len(),
        plane_sums: &mut plane_sums,
        steps: None,
    };
    // SAFETY: the table exists only on a CPU that has its instruction set; `hi` is as long as x.
    unsafe { (kernels.quantize)(RowValues { x, norm: None }, target) };
    scale
}

/// Codes of one head in the rows of a group.
type Codes = [[i8; MAX_HEAD_DIM]; GROUP];
const NO_CODES: Codes = [[0; MAX_HEAD_DIM]; GROUP];

/// Largest `head_dim`: keeps an integer score inside i32.
pub const MAX_HEAD_DIM: usize = 512;

/// Inputs that lie together in int8 panels.
const GROUP: usize = 4;

/// Below this many values a region costs more than it saves.
const PARALLEL_VALUES: usize = 8192;
