//! Units of the index: sizes, numbers and values that must not be mixed up.

use super::{CHUNK, MAX_IMAGE_SIZE, PAGE};
use crate::hex;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// The BLAKE3 of a whole image; `b3sum` prints the same digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Root(pub [u8; 32]);

/// A text that is not a root.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a root: expected 64 lower-case hex digits")]
pub struct RootError {
    /// What was given.
    pub text: String,
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Root {
    type Err = RootError;

    fn from_str(text: &str) -> Result<Self, RootError> {
        hex::decode(text).map(Self).ok_or_else(|| RootError {
            text: text.to_owned(),
        })
    }
}

impl Serialize for Root {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Root {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// What a chunk is checked against: its value inside the image's BLAKE3 tree.
///
/// It depends on the chunk's place as well as on its bytes. An image of a single
/// chunk is checked against its root, and this holds the root's bytes. Either
/// way it names the content: two chunks with the same value are the same, so it
/// serves as the key of a cache that many images share.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkValue(pub [u8; 32]);

impl fmt::Debug for ChunkValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkValue({})", hex::encode(&self.0))
    }
}

impl fmt::Display for ChunkValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

/// What a page of the tree is checked against: a value of the page above it, or
/// the root's bytes for the top page. It names the page's content.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageValue(pub [u8; 32]);

impl fmt::Debug for PageValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageValue({})", hex::encode(&self.0))
    }
}

/// The number of a chunk in its image, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkNo(pub u64);

impl ChunkNo {
    /// The chunk that holds the byte at `offset` of the image.
    pub const fn containing(offset: u64) -> Self {
        Self(offset / CHUNK)
    }
}

impl fmt::Display for ChunkNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A range of bytes in a file; which file, the context says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ByteRange {
    /// The first byte.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
}

impl ByteRange {
    /// `length` bytes from `offset`.
    pub const fn new(offset: u64, length: u64) -> Self {
        Self { offset, length }
    }

    /// One past the last byte, unless that is more than 2⁶⁴.
    pub const fn end(self) -> Option<u64> {
        self.offset.checked_add(self.length)
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {}", self.length, self.offset)
    }
}

/// The size of an image in bytes: positive, a multiple of 4096, at most
/// [`MAX_IMAGE_SIZE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct ImageSize(u64);

/// A number that cannot be the size of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{bytes} bytes cannot be the size of an image: expected a positive multiple of 4096 of at most {MAX_IMAGE_SIZE}"
)]
pub struct SizeError {
    /// What was given.
    pub bytes: u64,
}

impl ImageSize {
    /// Takes `bytes` if an image can have this size.
    pub const fn new(bytes: u64) -> Result<Self, SizeError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE) || bytes > MAX_IMAGE_SIZE {
            return Err(SizeError { bytes });
        }
        Ok(Self(bytes))
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// How many chunks an image of this size has; at least one.
    pub const fn chunks(self) -> u64 {
        self.0.div_ceil(CHUNK)
    }
}

impl TryFrom<u64> for ImageSize {
    type Error = SizeError;

    fn try_from(bytes: u64) -> Result<Self, SizeError> {
        Self::new(bytes)
    }
}

impl From<ImageSize> for u64 {
    fn from(size: ImageSize) -> Self {
        size.0
    }
}

impl fmt::Display for ImageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_reads_back_as_b3sum_prints_it() {
        let root = Root(*blake3::hash(b"x").as_bytes());
        assert_eq!(root.to_string(), blake3::hash(b"x").to_hex().as_str());
        assert_eq!(root.to_string().parse(), Ok(root));
        assert!("ab".parse::<Root>().is_err());
    }

    #[test]
    fn sizes_that_no_image_has_are_refused() {
        for bytes in [0, 1, 4095, 4097, MAX_IMAGE_SIZE + 4096, u64::MAX] {
            assert_eq!(ImageSize::new(bytes), Err(SizeError { bytes }));
            assert!(serde_json::from_str::<ImageSize>(&bytes.to_string()).is_err());
        }
        assert_eq!(ImageSize::new(CHUNK + PAGE).unwrap().chunks(), 2);
        assert_eq!(ImageSize::new(MAX_IMAGE_SIZE).unwrap().chunks(), 1 << 27);
    }
}
