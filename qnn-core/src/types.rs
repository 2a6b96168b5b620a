//! QNN's data and tensor types, with QNN's names and numbers.

/// Element type of a tensor. The numbers are those of `Qnn_DataType_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are QNN's own and say it all")]
pub enum DataType {
    Int8 = 0x0008,
    Int16 = 0x0016,
    Int32 = 0x0032,
    UInt8 = 0x0108,
    UInt16 = 0x0116,
    UInt32 = 0x0132,
    Float16 = 0x0216,
    Float32 = 0x0232,
    BFloat16 = 0x0616,
    SFixedPoint4 = 0x0304,
    SFixedPoint8 = 0x0308,
    SFixedPoint16 = 0x0316,
    SFixedPoint32 = 0x0332,
    UFixedPoint4 = 0x0404,
    UFixedPoint8 = 0x0408,
    UFixedPoint16 = 0x0416,
    UFixedPoint32 = 0x0432,
    Bool8 = 0x0508,
}

impl DataType {
    /// Every type, with the name used in files and messages.
    pub const ALL: &[(DataType, &str)] = &[
        (DataType::Int8, "INT_8"),
        (DataType::Int16, "INT_16"),
        (DataType::Int32, "INT_32"),
        (DataType::UInt8, "UINT_8"),
        (DataType::UInt16, "UINT_16"),
        (DataType::UInt32, "UINT_32"),
        (DataType::Float16, "FLOAT_16"),
        (DataType::Float32, "FLOAT_32"),
        (DataType::BFloat16, "BFLOAT_16"),
        (DataType::SFixedPoint4, "SFIXED_POINT_4"),
        (DataType::SFixedPoint8, "SFIXED_POINT_8"),
        (DataType::SFixedPoint16, "SFIXED_POINT_16"),
        (DataType::SFixedPoint32, "SFIXED_POINT_32"),
        (DataType::UFixedPoint4, "UFIXED_POINT_4"),
        (DataType::UFixedPoint8, "UFIXED_POINT_8"),
        (DataType::UFixedPoint16, "UFIXED_POINT_16"),
        (DataType::UFixedPoint32, "UFIXED_POINT_32"),
        (DataType::Bool8, "BOOL_8"),
    ];

    /// Width of one element in bits. Four-bit elements lie two to a byte, the first in the low half.
    pub fn bits(self) -> usize {
        match self {
            DataType::SFixedPoint4 | DataType::UFixedPoint4 => 4,
            DataType::Int8 | DataType::UInt8 | DataType::SFixedPoint8 | DataType::UFixedPoint8 | DataType::Bool8 => 8,
            DataType::Int16
            | DataType::UInt16
            | DataType::Float16
            | DataType::BFloat16
            | DataType::SFixedPoint16
            | DataType::UFixedPoint16 => 16,
            DataType::Int32
            | DataType::UInt32
            | DataType::Float32
            | DataType::SFixedPoint32
            | DataType::UFixedPoint32 => 32,
        }
    }

    /// True for the fixed-point types, whose numbers mean something only together with an encoding.
    pub fn is_fixed_point(self) -> bool {
        self.name().contains("FIXED_POINT")
    }

    /// True for f32, f16 and bf16.
    pub fn is_float(self) -> bool {
        matches!(self, DataType::Float32 | DataType::Float16 | DataType::BFloat16)
    }

    /// Name in files and messages: `SFIXED_POINT_8`.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(t, _)| *t == self).map_or("?", |(_, name)| name)
    }

    /// The type called `name`.
    pub fn from_name(name: &str) -> Option<DataType> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(t, _)| *t)
    }
}

impl std::fmt::Display for DataType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a tensor is to a graph. The numbers are those of `Qnn_TensorType_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum TensorType {
    /// Input: written by the client before each execute.
    AppWrite = 0,
    /// Output: read by the client after each execute.
    AppRead = 1,
    /// State that both sides keep between executes: the KV cache.
    AppReadWrite = 2,
    /// Intermediate result.
    Native = 3,
    /// Constant.
    Static = 4,
    /// Constant whose data or encodings a binary section may replace.
    UpdateableStatic = 6,
    /// Intermediate result whose encodings a binary section may replace.
    UpdateableNative = 7,
    /// Input whose encodings a binary section may replace.
    UpdateableAppWrite = 8,
    /// Output whose encodings a binary section may replace.
    UpdateableAppRead = 9,
    /// State whose encodings a binary section may replace.
    UpdateableAppReadWrite = 10,
}

impl TensorType {
    /// Every type, with the name used in files and messages.
    pub const ALL: &[(TensorType, &str)] = &[
        (TensorType::AppWrite, "APP_WRITE"),
        (TensorType::AppRead, "APP_READ"),
        (TensorType::AppReadWrite, "APP_READWRITE"),
        (TensorType::Native, "NATIVE"),
        (TensorType::Static, "STATIC"),
        (TensorType::UpdateableStatic, "UPDATEABLE_STATIC"),
        (TensorType::UpdateableNative, "UPDATEABLE_NATIVE"),
        (TensorType::UpdateableAppWrite, "UPDATEABLE_APP_WRITE"),
        (TensorType::UpdateableAppRead, "UPDATEABLE_APP_READ"),
        (TensorType::UpdateableAppReadWrite, "UPDATEABLE_APP_READWRITE"),
    ];

    /// Name in files and messages: `APP_WRITE`.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(t, _)| *t == self).map_or("?", |(_, name)| name)
    }

    /// The type called `name`.
    pub fn from_name(name: &str) -> Option<TensorType> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(t, _)| *t)
    }

    /// True for constants, updateable or not.
    pub fn is_static(self) -> bool {
        matches!(self, TensorType::Static | TensorType::UpdateableStatic)
    }

    /// The same, so that a binary section may replace the encodings.
    #[must_use]
    pub fn updateable(self) -> TensorType {
        match self {
            TensorType::AppWrite => TensorType::UpdateableAppWrite,
            TensorType::AppRead => TensorType::UpdateableAppRead,
            TensorType::AppReadWrite => TensorType::UpdateableAppReadWrite,
            TensorType::Native => TensorType::UpdateableNative,
            TensorType::Static => TensorType::UpdateableStatic,
            other => other,
        }
    }

    /// True if a binary section may replace the encodings (and, of a constant, the data).
    pub fn is_updateable(self) -> bool {
        self as u32 >= TensorType::UpdateableStatic as u32
    }

    /// True for graph inputs, updateable or not.
    pub fn is_input(self) -> bool {
        matches!(self, TensorType::AppWrite | TensorType::UpdateableAppWrite)
    }

    /// True for graph outputs, updateable or not.
    pub fn is_output(self) -> bool {
        matches!(self, TensorType::AppRead | TensorType::UpdateableAppRead)
    }

    /// True for state, updateable or not.
    pub fn is_state(self) -> bool {
        matches!(self, TensorType::AppReadWrite | TensorType::UpdateableAppReadWrite)
    }
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
