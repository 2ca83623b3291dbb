//! Extended attributes, within what EROFS can hold.

use crate::format::{XATTR_HEADER_SIZE, XATTR_UNIT};
use std::{collections::BTreeMap, fmt};

/// What EROFS cannot hold, or no Linux file system can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XattrError {
    /// Not `user.`, `trusted.`, `security.` or a POSIX ACL.
    #[error("extended attribute {name:?}: EROFS has no such namespace")]
    Namespace {
        /// The full name.
        name: String,
    },
    /// Nothing behind the prefix, more than 255 bytes in all, or a NUL.
    #[error(
        "extended attribute {name:?}: the name must have 1 to 255 bytes, something behind its prefix, and no NUL"
    )]
    Name {
        /// The full name.
        name: String,
    },
    /// A value larger than 65535 bytes.
    #[error("extended attribute {name:?}: {size} bytes, but EROFS holds at most 65535")]
    Value {
        /// The full name.
        name: String,
        /// Bytes of the value.
        size: usize,
    },
    /// All attributes of one file together are too many.
    #[error(
        "with extended attribute {name:?} the file has {size} bytes of them, but EROFS holds at most {}",
        Xattrs::MAX_SIZE
    )]
    Total {
        /// The full name of the one that was one too many.
        name: String,
        /// Bytes of all of them on disk.
        size: u64,
    },
}

/// The namespaces of EROFS: its number and the prefix of the names.
const PREFIXES: [(u8, &str); 5] = [
    (1, "user."),
    (2, "system.posix_acl_access"),
    (3, "system.posix_acl_default"),
    (4, "trusted."),
    (6, "security."),
];

/// A full attribute name in a namespace that EROFS has. Ordered as shared
/// attributes are on disk: namespace, then the rest.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct XattrName {
    prefix: u8,
    suffix: Box<[u8]>,
}

impl XattrName {
    /// The most bytes of a full name (`XATTR_NAME_MAX`).
    pub const MAX: usize = 255;

    /// Takes a full name, "user.mime_type".
    ///
    /// # Errors
    /// Names that EROFS cannot hold.
    pub fn new(full: &[u8]) -> Result<Self, XattrError> {
        let lossy = || String::from_utf8_lossy(full).into_owned();
        let (prefix, suffix, open) = PREFIXES
            .iter()
            .find_map(|(number, prefix)| {
                let suffix = full.strip_prefix(prefix.as_bytes())?;
                let open = prefix.ends_with('.');
                // A POSIX ACL's name is complete by itself.
                (open || suffix.is_empty()).then_some((*number, suffix, open))
            })
            .ok_or_else(|| XattrError::Namespace { name: lossy() })?;
        if (open && suffix.is_empty()) || full.len() > Self::MAX || full.contains(&0) {
            return Err(XattrError::Name { name: lossy() });
        }
        Ok(Self {
            prefix,
            suffix: suffix.into(),
        })
    }

    /// The name that a namespace's number and the rest of a name stand for.
    pub(crate) fn from_parts(prefix: u8, suffix: &[u8]) -> Option<Self> {
        let (_, text) = PREFIXES.iter().find(|(number, _)| *number == prefix)?;
        Self::new(&[text.as_bytes(), suffix].concat()).ok()
    }

    /// The full name.
    pub fn full(&self) -> Vec<u8> {
        let prefix = PREFIXES
            .iter()
            .find(|(number, _)| *number == self.prefix)
            .map_or("", |(_, text)| text);
        [prefix.as_bytes(), &self.suffix].concat()
    }

    /// Whether this is in the `trusted.` namespace.
    pub fn is_trusted(&self) -> bool {
        self.prefix == 4
    }

    /// The namespace's number.
    pub(crate) fn prefix(&self) -> u8 {
        self.prefix
    }

    /// The name without its prefix.
    pub(crate) fn suffix(&self) -> &[u8] {
        &self.suffix
    }
}

impl fmt::Debug for XattrName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.full().escape_ascii())
    }
}

/// The attributes of one file. They always fit into its inode, shared or not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Xattrs {
    entries: BTreeMap<XattrName, Box<[u8]>>,
    /// Bytes of them on disk, without the header before them.
    size: u64,
}

impl Xattrs {
    /// The most bytes that the attributes of a file take on disk: the inode
    /// counts them in units of 4 after the header, in 16 bits, from 1.
    pub const MAX_SIZE: u64 = XATTR_HEADER_SIZE + XATTR_UNIT * 65534;

    /// No attributes.
    pub const fn new() -> Self {
        Self {
            entries: BTreeMap::new(),
            size: 0,
        }
    }

    /// Sets an attribute, in place of one of the same name.
    ///
    /// # Errors
    /// A value or a total beyond what an inode holds; nothing changes then.
    pub fn insert(&mut self, name: XattrName, value: &[u8]) -> Result<(), XattrError> {
        let lossy = |name: &XattrName| String::from_utf8_lossy(&name.full()).into_owned();
        if u16::try_from(value.len()).is_err() {
            return Err(XattrError::Value {
                name: lossy(&name),
                size: value.len(),
            });
        }
        let replaced = self.entries.get(&name);
        let replaced = replaced.map_or(0, |value| entry_size(&name, value));
        let size = self.size - replaced + entry_size(&name, value);
        if XATTR_HEADER_SIZE + size > Self::MAX_SIZE {
            return Err(XattrError::Total {
                name: lossy(&name),
                size: XATTR_HEADER_SIZE + size,
            });
        }
        self.entries.insert(name, value.into());
        self.size = size;
        Ok(())
    }

    /// The value of an attribute.
    pub fn get(&self, name: &XattrName) -> Option<&[u8]> {
        self.entries.get(name).map(AsRef::as_ref)
    }

    /// Names and values, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&XattrName, &[u8])> {
        self.entries.iter().map(|(name, value)| (name, &**value))
    }

    /// Bytes of them on disk, without the header before them.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keeps what `keep` says.
    pub fn retain(&mut self, mut keep: impl FnMut(&XattrName) -> bool) {
        let size = &mut self.size;
        self.entries.retain(|name, value| {
            let kept = keep(name);
            if !kept {
                *size -= entry_size(name, value);
            }
            kept
        });
    }
}

/// Bytes of an attribute on disk, padding included.
pub(crate) fn entry_size(name: &XattrName, value: &[u8]) -> u64 {
    (XATTR_UNIT + name.suffix().len() as u64 + value.len() as u64).next_multiple_of(XATTR_UNIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> XattrName {
        XattrName::new(text.as_bytes()).unwrap()
    }

    #[test]
    fn names_keep_their_full_form() {
        for text in ["user.a", "security.capability", "trusted.overlay.opaque"] {
            assert_eq!(name(text).full(), text.as_bytes());
        }
        assert_eq!(name("system.posix_acl_access").suffix(), b"");
        assert_eq!(name("system.posix_acl_default").prefix(), 3);
        for text in [
            "system.nfs4_acl",
            "system.posix_acl_accessX",
            "os2.x",
            "user",
            "",
        ] {
            let error = XattrName::new(text.as_bytes()).unwrap_err();
            assert!(
                matches!(error, XattrError::Namespace { .. }),
                "{text:?}: {error}"
            );
        }
        for text in ["user.", "user.a\0b", &format!("user.{}", "x".repeat(251))] {
            let error = XattrName::new(text.as_bytes()).unwrap_err();
            assert!(
                matches!(error, XattrError::Name { .. }),
                "{text:?}: {error}"
            );
        }
    }

    #[test]
    fn what_an_inode_cannot_hold_is_refused_and_changes_nothing() {
        let mut xattrs = Xattrs::new();
        let error = xattrs.insert(name("user.a"), &[0; 65536]).unwrap_err();
        assert!(matches!(error, XattrError::Value { size: 65536, .. }));
        for number in 0..4 {
            let value = vec![number; 65000];
            xattrs
                .insert(name(&format!("user.{number}")), &value)
                .unwrap();
        }
        let before = xattrs.clone();
        let error = xattrs.insert(name("user.4"), &[0; 3000]).unwrap_err();
        assert!(matches!(error, XattrError::Total { .. }));
        assert_eq!(xattrs, before);
        // The same name again counts once, one that went not at all.
        xattrs.insert(name("user.3"), &[9; 65000]).unwrap();
        xattrs.retain(|other| *other != name("user.0"));
        xattrs.insert(name("user.4"), &[0; 65000]).unwrap();
    }
}
