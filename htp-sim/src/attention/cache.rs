//! The KV cache: keys in panels of 16 positions; values in rows, or in panels of 16 of a head's values.
//!
//! | format | keys | values |
//! | --- | --- | --- |
//! | F32, F16 | `[kv_head][position/16][head_dim][16]` elements | `[kv_head][position][head_dim]` elements |
//! | Int8 | `[kv_head][position/16][head_dim/4][16][4]` i8 | `[kv_head][position/256][head_dim/16][64][16][4]` i8 |
//!
//! After the i8 come the scales, `[kv_head][position]` f32. So a head's keys are packed weights with an output for each
//! position, and each 256 of its values packed weights with an input for each position: the products of both are those of a
//! linear layer. The capacity is padded to 16 positions and, in int8 values, to 256; `head_dim` is padded to 4 in int8 keys
//! and to 16 in int8 values.

use half::f16;

use super::RANGE;
use crate::Cx;
use crate::error::{Needed, ShapeError, expect_at_most, expect_len, size};
use crate::kernels::{Kernels, QuantizedRowMut, RowValues};
use crate::packed::PANEL;
use crate::scratch::Disjoint;

/// How the cache's elements are stored.
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
        size("bytes of a cache", &[kv_heads, positions, head_dim.next_multiple_of(PANEL) + 4, 4])?;
        Ok(Self { kv_heads, head_dim, capacity, format })
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

    /// Bytes of the keys.
    pub fn key_bytes(&self) -> usize {
        self.kv_heads * (self.head_key_bytes() + self.head_scale_bytes())
    }

    /// Bytes of the values.
    pub fn value_bytes(&self) -> usize {
        self.kv_heads * (self.head_value_bytes() + self.head_scale_bytes())
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

    /// Bytes of [`RANGE`] positions of one head's int8 values.
    fn value_range_bytes(&self) -> usize {
        RANGE * self.value_head_dim()
    }

    fn positions(&self) -> usize {
        self.capacity.next_multiple_of(PANEL)
    }

    fn head_key_bytes(&self) -> usize {
        self.positions() / PANEL * self.key_panel_bytes()
    }

    fn head_value_bytes(&self) -> usize {
        match self.format {
            CacheFormat::Int8 => self.capacity.div_ceil(RANGE) * self.value_range_bytes(),
            _ => self.positions() * self.head_dim * self.format.element_bytes(),
        }
    }

    fn head_scale_bytes(&self) -> usize {
        if self.format == CacheFormat::Int8 { self.positions() * 4 } else { 0 }
    }
}

/// One layer's cache, borrowed for reading.
#[derive(Debug, Clone, Copy)]
pub struct Cache<'a> {
    /// Shape and format.
    pub layout: CacheLayout,
    /// [`CacheLayout::key_bytes`] bytes.
    pub key: &'a [u8],
    /// [`CacheLayout::value_bytes`] bytes.
    pub value: &'a [u8],
}

impl<'a> Cache<'a> {
    /// The key panels of `head` from position `from` (a multiple of 16) on.
    pub(crate) fn keys(&self, head: usize, from: usize) -> &'a [u8] {
        let layout = &self.layout;
        &self.key[head * layout.head_key_bytes() + from / PANEL * layout.key_panel_bytes()..]
    }

    /// The f32 scales of the keys of `head` from position `from` on; empty for float formats.
    pub(crate) fn key_scales(&self, head: usize, from: usize) -> &'a [u8] {
        let layout = &self.layout;
        let from = if layout.format == CacheFormat::Int8 { from * 4 } else { 0 };
        &self.key[layout.kv_heads * layout.head_key_bytes() + head * layout.head_scale_bytes() + from..]
    }

    /// The values of `head` from position `from` on, in the float formats.
    pub(crate) fn value_rows(&self, head: usize, from: usize) -> &'a [u8] {
        let layout = &self.layout;
        let row_bytes = layout.head_dim * layout.format.element_bytes();
        &self.value[head * layout.head_value_bytes() + from * row_bytes..]
    }

    /// The first value panel of `head` in the range of position `from`, from that position (a multiple of 4) on; int8 only.
    pub(crate) fn value_panels(&self, head: usize, from: usize) -> &'a [u8] {
        let layout = &self.layout;
        let range = from / RANGE * layout.value_range_bytes();
        &self.value[head * layout.head_value_bytes() + range + from % RANGE * PANEL..]
    }

    /// The f32 scales of the values of `head` from position `from` on; empty for float formats.
    pub(crate) fn value_scales(&self, head: usize, from: usize) -> &'a [u8] {
        let layout = &self.layout;
        let from = if layout.format == CacheFormat::Int8 { from * 4 } else { 0 };
        &self.value[layout.kv_heads * layout.head_value_bytes() + head * layout.head_scale_bytes() + from..]
    }
}

/// One layer's cache, borrowed for writing.
#[derive(Debug)]
pub struct CacheMut<'a> {
    /// Shape and format.
    pub layout: CacheLayout,
    /// [`CacheLayout::key_bytes`] bytes.
    pub key: &'a mut [u8],
    /// [`CacheLayout::value_bytes`] bytes.
    pub value: &'a mut [u8],
}

impl CacheMut<'_> {
    /// The same cache for reading.
    pub fn as_ref(&self) -> Cache<'_> {
        Cache { layout: self.layout, key: self.key, value: self.value }
    }
}

/// Asks for the memory around position `at` that [`append`] will write and [`attention`](super::attention) read. A decode
/// step goes through more weights than the caches hold between two visits of a layer: what it wrote last is far away.
///
/// A hint: it changes nothing, and does nothing for a position beyond the capacity or a cache of another length.
pub fn prefetch(cx: &Cx<'_>, cache: &Cache<'_>, at: usize) {
    let layout = cache.layout;
    let whole = cache.key.len() == layout.key_bytes() && cache.value.len() == layout.value_bytes();
    if !whole || at >= layout.capacity {
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
    expect_len("bytes of keys", cache.key.len(), layout.key_bytes())?;
    expect_len("bytes of values", cache.value.len(), layout.value_bytes())?;
    let width = layout.kv_heads * layout.head_dim;
    if !k.len().is_multiple_of(width) {
        return Err(ShapeError::new("length of k", k.len(), Needed::MultipleOf(width)));
    }
    expect_len("length of v", v.len(), k.len())?;
    let m = k.len() / width;
    expect_at_most("positions after this step", at.saturating_add(m), layout.capacity)?;

    let (keys, key_scales) = cache.key.split_at_mut(layout.kv_heads * layout.head_key_bytes());
    let (values, value_scales) = cache.value.split_at_mut(layout.kv_heads * layout.head_value_bytes());
    let (keys, key_scales) = (Disjoint::new(keys), Disjoint::new(key_scales));
    let (values, value_scales) = (Disjoint::new(values), Disjoint::new(value_scales));
    let append_head = |head: usize| {
        // SAFETY: each head is one item, and its ranges are its own.
        let mut target = unsafe {
            HeadMut {
                layout,
                kernels: cx.kernels,
                keys: keys.range(head * layout.head_key_bytes(), layout.head_key_bytes()),
                key_scales: key_scales.range(head * layout.head_scale_bytes(), layout.head_scale_bytes()),
                values: values.range(head * layout.head_value_bytes(), layout.head_value_bytes()),
                value_scales: value_scales.range(head * layout.head_scale_bytes(), layout.head_scale_bytes()),
                codes: [[0; MAX_HEAD_DIM]; GROUP],
            }
        };
        let mut row = 0;
        while row < m {
            let from = row * width + head * layout.head_dim;
            let is_group = layout.format == CacheFormat::Int8 && (at + row).is_multiple_of(GROUP) && m - row >= GROUP;
            let rows = if is_group { GROUP } else { 1 };
            target.write(at + row, rows, width, &k[from..], &v[from..]);
            row += rows;
        }
    };
    if k.len() < PARALLEL_VALUES {
        (0..layout.kv_heads).for_each(append_head);
    } else {
        cx.workers.for_each(layout.kv_heads, |head, _| append_head(head));
    }
    Ok(())
}

/// One head's part of the cache.
struct HeadMut<'a> {
    layout: CacheLayout,
    kernels: &'static Kernels,
    keys: &'a mut [u8],
    key_scales: &'a mut [u8],
    values: &'a mut [u8],
    value_scales: &'a mut [u8],
    /// Int8: rows on their way.
    codes: [[i8; MAX_HEAD_DIM]; GROUP],
}

impl HeadMut<'_> {
    /// Writes `rows` rows, `stride` apart in `k` and `v`: one, or in an int8 cache those of a whole group.
    fn write(&mut self, position: usize, rows: usize, stride: usize, k: &[f32], v: &[f32]) {
        let head_dim = self.layout.head_dim;
        match self.layout.format {
            CacheFormat::F32 => self.write_floats(position, &k[..head_dim], &v[..head_dim], |x| x.to_le_bytes()),
            CacheFormat::F16 => {
                self.write_floats(position, &k[..head_dim], &v[..head_dim], |x| f16::from_f32(x).to_le_bytes());
            }
            CacheFormat::Int8 => {
                for row in 0..rows {
                    self.write_int8_key(position + row, &k[row * stride..][..head_dim]);
                }
                self.write_int8_values(position, rows, stride, v);
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

    fn write_int8_key(&mut self, position: usize, k: &[f32]) {
        let scale = quantize(self.kernels, k, &mut self.codes[0]);
        let panel_bytes = self.layout.key_panel_bytes();
        let panel = &mut self.keys[position / PANEL * panel_bytes..][..panel_bytes];
        let groups = panel.as_chunks_mut::<GROUP>().0.iter_mut().skip(position % PANEL).step_by(PANEL);
        // What pads a row to whole groups is zeros.
        self.codes[0][k.len()..k.len().next_multiple_of(GROUP)].fill(0);
        for (to, codes) in groups.zip(self.codes[0].as_chunks::<GROUP>().0) {
            *to = codes.map(i8::cast_unsigned);
        }
        self.key_scales[position * 4..][..4].copy_from_slice(&scale.to_le_bytes());
    }

    /// The rows of a whole group meet in each four bytes; a single row has one of them.
    fn write_int8_values(&mut self, position: usize, rows: usize, stride: usize, v: &[f32]) {
        let head_dim = self.layout.head_dim;
        for (row, codes) in self.codes.iter_mut().take(rows).enumerate() {
            let scale = quantize(self.kernels, &v[row * stride..][..head_dim], codes);
            self.value_scales[(position + row) * 4..][..4].copy_from_slice(&scale.to_le_bytes());
        }
        let range_bytes = self.layout.value_range_bytes();
        let range = &mut self.values[position / RANGE * range_bytes..][..range_bytes];
        for (first, panel) in (0..head_dim).step_by(PANEL).zip(range.chunks_exact_mut(RANGE * PANEL)) {
            let columns = first..head_dim.min(first + PANEL);
            let groups = panel[position % RANGE / GROUP * GROUP * PANEL..].as_chunks_mut::<GROUP>().0;
            let [a, b, c, d] = self.codes.each_ref().map(|codes| &codes[columns.clone()]);
            if rows == GROUP {
                for (((to, a), (b, c)), d) in groups.iter_mut().zip(a).zip(b.iter().zip(c)).zip(d) {
                    *to = [*a, *b, *c, *d].map(i8::cast_unsigned);
                }
            } else {
                groups.iter_mut().zip(a).for_each(|(to, code)| to[position % GROUP] = code.cast_unsigned());
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

/// Largest `head_dim`: keeps an integer score inside i32.
pub const MAX_HEAD_DIM: usize = 512;

/// Inputs that lie together in int8 panels.
const GROUP: usize = 4;

/// Below this many values a region costs more than it saves.
const PARALLEL_VALUES: usize = 8192;
