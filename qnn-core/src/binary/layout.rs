//! Byte structs of the container, field for field as in `FORMAT.md`.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// The first 128 bytes of a file.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) magic: [u8; 4],
    pub(crate) format_version: U16,
    pub(crate) kind: U16,
    pub(crate) sdk_version: [U16; 3],
    pub(crate) reserved_14: U16,
    pub(crate) file_bytes: U64,
    pub(crate) table_at_bytes: U64,
    pub(crate) n_sections: U32,
    pub(crate) names_bytes: U32,
    pub(crate) table_crc32: U32,
    pub(crate) reserved_44: U32,
    pub(crate) identity: [u8; 32],
    pub(crate) base_identity: [u8; 32],
    pub(crate) reserved_112: [u8; 12],
    pub(crate) header_crc32: U32,
}

/// One row of the section table.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Entry {
    pub(crate) kind: U32,
    pub(crate) name_bytes: U32,
    pub(crate) crc32: U32,
    pub(crate) reserved_12: U32,
    pub(crate) at_bytes: U64,
    pub(crate) size_bytes: U64,
}

/// One entry of LAYOUTS.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct TensorLayout {
    pub(crate) n: U32,
    pub(crate) k: U32,
    pub(crate) format: U32,
    pub(crate) tight: U32,
}

impl Header {
    /// Checksum of everything before the checksum.
    pub(crate) fn crc32(&self) -> u32 {
        crc32fast::hash(&self.as_bytes()[..HEADER_BYTES - 4])
    }
}

/// The first bytes of every file.
pub(crate) const MAGIC: [u8; 4] = *b"GNCB";
/// The newest version that is read, and the one of adapter sections.
pub(crate) const FORMAT_VERSION: u16 = 2;
/// The version of contexts: nothing in them is new since.
pub(crate) const CONTEXT_FORMAT_VERSION: u16 = 1;
/// Size of [`Header`].
pub(crate) const HEADER_BYTES: usize = size_of::<Header>();
/// Size of [`Entry`].
pub(crate) const ENTRY_BYTES: usize = size_of::<Entry>();
/// Sections and the table start at multiples of this.
pub(crate) const ALIGN_BYTES: u64 = 64;

const _: () = assert!(HEADER_BYTES == 128 && ENTRY_BYTES == 32 && size_of::<TensorLayout>() == 16);
