//! Values that are right once they exist: names, link targets, device numbers,
//! times, permissions.

use std::{borrow::Borrow, fmt};

/// Why bytes are no name of a directory entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing, ".", or "..".
    #[error("is empty, \".\" or \"..\"")]
    Reserved,
    /// More than 255 bytes.
    #[error("is {0} bytes long, more than 255")]
    TooLong(usize),
    /// A slash or a NUL.
    #[error("contains a slash or a NUL byte")]
    Byte,
}

/// The name of a directory entry: 1 to 255 bytes, neither "." nor "..", without
/// '/' and NUL. Ordered by bytes, as on disk.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Box<[u8]>);

impl Name {
    /// The most bytes a name can have.
    pub const MAX: usize = 255;

    /// Checks `bytes`.
    ///
    /// # Errors
    /// What no directory can hold.
    pub fn new(bytes: &[u8]) -> Result<Self, NameError> {
        if matches!(bytes, b"" | b"." | b"..") {
            return Err(NameError::Reserved);
        }
        if bytes.len() > Self::MAX {
            return Err(NameError::TooLong(bytes.len()));
        }
        if bytes.iter().any(|byte| matches!(byte, b'/' | 0)) {
            return Err(NameError::Byte);
        }
        Ok(Self(bytes.into()))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

/// Why bytes are no target of a symbolic link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Nothing.
    #[error("is empty")]
    Empty,
    /// More than 4095 bytes.
    #[error("is {0} bytes long, more than 4095")]
    TooLong(usize),
    /// A NUL.
    #[error("contains a NUL byte")]
    Byte,
}

/// What a symbolic link says: 1 to 4095 bytes without NUL.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SymlinkTarget(Box<[u8]>);

impl SymlinkTarget {
    /// The most bytes a target can have (`PATH_MAX` without its NUL).
    pub const MAX: usize = 4095;

    /// Checks `bytes`.
    ///
    /// # Errors
    /// What `symlink(2)` would refuse.
    pub fn new(bytes: &[u8]) -> Result<Self, TargetError> {
        if bytes.is_empty() {
            return Err(TargetError::Empty);
        }
        if bytes.len() > Self::MAX {
            return Err(TargetError::TooLong(bytes.len()));
        }
        if bytes.contains(&0) {
            return Err(TargetError::Byte);
        }
        Ok(Self(bytes.into()))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SymlinkTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

/// A device number that Linux does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "device number {major}:{minor} is out of range; Linux has majors below 4096 and minors below 1048576"
)]
pub struct DeviceError {
    /// The major number asked for.
    pub major: u64,
    /// The minor number asked for.
    pub minor: u64,
}

/// A device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Device {
    major: u32,
    minor: u32,
}

impl Device {
    /// 0:0, which as a character device is overlayfs' whiteout.
    pub const WHITEOUT: Self = Self { major: 0, minor: 0 };

    /// Checks the two parts.
    ///
    /// # Errors
    /// A number that does not fit into Linux' 12 + 20 bits.
    pub fn new(major: u64, minor: u64) -> Result<Self, DeviceError> {
        match (u32::try_from(major), u32::try_from(minor)) {
            (Ok(major), Ok(minor)) if major < 1 << 12 && minor < 1 << 20 => {
                Ok(Self { major, minor })
            }
            _ => Err(DeviceError { major, minor }),
        }
    }

    /// The major number.
    pub const fn major(self) -> u32 {
        self.major
    }

    /// The minor number.
    pub const fn minor(self) -> u32 {
        self.minor
    }

    /// As the kernel's `new_encode_dev` has it: the minor's low byte, the major,
    /// the rest of the minor.
    pub(crate) const fn encode(self) -> u32 {
        (self.minor & 0xff) | (self.major << 8) | ((self.minor & !0xff) << 12)
    }
}

/// Nanoseconds outside a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{nanos} nanoseconds are not part of a second")]
pub struct TimestampError {
    /// The nanoseconds asked for.
    pub nanos: u32,
}

/// A time: seconds since 1970, which may be negative, and nanoseconds after them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    seconds: i64,
    nanos: u32,
}

impl Timestamp {
    /// 1970-01-01 00:00:00 UTC.
    pub const EPOCH: Self = Self {
        seconds: 0,
        nanos: 0,
    };

    /// Checks the two parts.
    ///
    /// # Errors
    /// A second or more in `nanos`.
    pub const fn new(seconds: i64, nanos: u32) -> Result<Self, TimestampError> {
        if nanos < 1_000_000_000 {
            Ok(Self { seconds, nanos })
        } else {
            Err(TimestampError { nanos })
        }
    }

    /// Whole seconds since 1970.
    pub const fn seconds(self) -> i64 {
        self.seconds
    }

    /// Nanoseconds after them.
    pub const fn nanos(self) -> u32 {
        self.nanos
    }
}

/// Permission bits with set-user-ID, set-group-ID and sticky: the low 12 bits of
/// a mode.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Permissions(u16);

impl Permissions {
    /// The permission bits of `mode`; its other bits are left out.
    pub const fn of_mode(mode: u32) -> Self {
        Self((mode & 0o7777) as u16)
    }

    /// The 12 bits.
    pub const fn bits(self) -> u16 {
        self.0
    }
}

impl fmt::Debug for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0{:03o}", self.0)
    }
}

/// What kind of file a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
}

impl FileKind {
    /// The type bits of a mode (`S_IFMT`).
    pub const fn mode_bits(self) -> u16 {
        match self {
            Self::Fifo => 0o010_000,
            Self::CharDevice => 0o020_000,
            Self::Directory => 0o040_000,
            Self::BlockDevice => 0o060_000,
            Self::File => 0o100_000,
            Self::Symlink => 0o120_000,
            Self::Socket => 0o140_000,
        }
    }

    /// The kind that a mode's type bits name.
    pub const fn of_mode(mode: u16) -> Option<Self> {
        Some(match mode & 0o170_000 {
            0o010_000 => Self::Fifo,
            0o020_000 => Self::CharDevice,
            0o040_000 => Self::Directory,
            0o060_000 => Self::BlockDevice,
            0o100_000 => Self::File,
            0o120_000 => Self::Symlink,
            0o140_000 => Self::Socket,
            _ => return None,
        })
    }

    /// The type as directory entries carry it.
    pub(crate) const fn dirent_type(self) -> u8 {
        match self {
            Self::File => 1,
            Self::Directory => 2,
            Self::CharDevice => 3,
            Self::BlockDevice => 4,
            Self::Fifo => 5,
            Self::Socket => 6,
            Self::Symlink => 7,
        }
    }
}

/// The UUID of an image.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, byte) in self.0.iter().enumerate() {
            if matches!(position, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_a_directory_can_hold() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'x'; 256]] {
            assert!(Name::new(bad).is_err(), "{}", bad.escape_ascii());
        }
        for good in [&b"..."[..], b" ", b"\xff\n\\", &[b'x'; 255]] {
            assert_eq!(Name::new(good).unwrap().as_bytes(), good);
        }
    }

    #[test]
    fn device_numbers_are_encoded_as_the_kernel_does() {
        // new_encode_dev of 259:1 and of the largest number.
        assert_eq!(Device::new(259, 1).unwrap().encode(), 0x0001_0301);
        assert_eq!(Device::new(0xfff, 0xf_ffff).unwrap().encode(), u32::MAX);
        assert_eq!(Device::new(8, 0x12345).unwrap().encode(), 0x1230_0845);
        assert!(Device::new(4096, 0).is_err());
        assert!(Device::new(0, 1 << 20).is_err());
    }

    #[test]
    fn a_uuid_is_printed_in_five_groups() {
        let uuid = Uuid([
            0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0x8d, 0xef, 0x81, 0x23, 0x45, 0x67, 0x89, 0xab,
            0xcd, 0xef,
        ]);
        assert_eq!(uuid.to_string(), "01234567-89ab-8def-8123-456789abcdef");
    }
}
