//! POSIX access control lists, as Linux keeps them.
//!
//! A file system does more with an ACL than to store it: it refuses what is none,
//! turns one that says no more than the mode into the mode, changes it with the
//! mode, and lets new files inherit their directory's default ACL. An unpack shows
//! what comes of that, so it is done here too, as in `fs/posix_acl.c`.
//!
//! The value of `system.posix_acl_access` and `system.posix_acl_default`: a version
//! (2, 32 bits), then entries of 8 bytes: tag and permissions (16 bits each), id
//! (32 bits).

/// The attribute with a file's own ACL.
pub const ACCESS: &[u8] = b"system.posix_acl_access";
/// The attribute with what new files in a directory inherit.
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: [u8; 4] = 2u32.to_le_bytes();
const NO_ID: u32 = u32::MAX;

/// Whom an entry is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tag {
    UserObj,
    User(u32),
    GroupObj,
    Group(u32),
    Mask,
    Other,
}

/// An ACL that Linux takes, with at least the three entries that a mode has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acl(Vec<(Tag, u16)>);

impl Acl {
    /// Whether the value is of a version that Linux does not have.
    pub fn is_foreign(value: &[u8]) -> bool {
        value.len() >= VERSION.len() && !value.starts_with(&VERSION)
    }

    /// Reads an attribute's value. One without entries is no ACL.
    pub fn parse(value: &[u8]) -> Result<Option<Self>, &'static str> {
        if value.is_empty() {
            return Ok(None);
        }
        let entries = value.strip_prefix(&VERSION).ok_or("is no ACL")?;
        let mut acl = Vec::with_capacity(entries.len() / 8);
        for entry in entries.chunks(8) {
            let &[t0, t1, p0, p1, i0, i1, i2, i3] = entry else {
                return Err("is an ACL that ends within an entry");
            };
            let id = u32::from_le_bytes([i0, i1, i2, i3]);
            let tag = match u16::from_le_bytes([t0, t1]) {
                0x01 => Tag::UserObj,
                0x02 if id != NO_ID => Tag::User(id),
                0x04 => Tag::GroupObj,
                0x08 if id != NO_ID => Tag::Group(id),
                0x10 => Tag::Mask,
                0x20 => Tag::Other,
                _ => return Err("is an ACL with an entry for nobody"),
            };
            acl.push((tag, u16::from_le_bytes([p0, p1])));
        }
        if acl.is_empty() {
            return Ok(None);
        }
        let acl = Self(acl);
        acl.check()?;
        Ok(Some(acl))
    }

    /// In order: the owner, users, the group, groups, the mask (needed with users
    /// or groups), all others.
    fn check(&self) -> Result<(), &'static str> {
        let rank = |tag| match tag {
            Tag::UserObj => 0,
            Tag::User(_) => 1,
            Tag::GroupObj => 2,
            Tag::Group(_) => 3,
            Tag::Mask => 4,
            Tag::Other => 5,
        };
        let several = |tag| matches!(tag, Tag::User(_) | Tag::Group(_));
        let in_order = self.0.is_sorted_by(|(a, _), (b, _)| {
            rank(*a) < rank(*b) || (rank(*a) == rank(*b) && several(*a))
        });
        let has = |wanted| self.0.iter().any(|(tag, _)| *tag == wanted);
        let complete = has(Tag::UserObj) && has(Tag::GroupObj) && has(Tag::Other);
        let named = self.0.iter().any(|(tag, _)| several(*tag));
        if !in_order || !complete || (named && !has(Tag::Mask)) {
            return Err("is an ACL with entries missing, twice or out of order");
        }
        if self.0.iter().any(|(_, permissions)| *permissions > 7) {
            return Err("is an ACL with permissions that there are not");
        }
        Ok(())
    }

    /// Whether a mode says the same.
    pub fn is_mode(&self) -> bool {
        self.0.len() == 3
    }

    /// What becomes of it when the file's mode is set.
    pub fn set_mode(&mut self, mode: u16) {
        let masked = self.0.iter().any(|(tag, _)| *tag == Tag::Mask);
        for (tag, permissions) in &mut self.0 {
            *permissions = match tag {
                Tag::UserObj => mode >> 6 & 7,
                Tag::GroupObj if !masked => mode >> 3 & 7,
                Tag::Mask => mode >> 3 & 7,
                Tag::Other => mode & 7,
                _ => continue,
            };
        }
    }

    /// The attribute's value.
    pub fn value(&self) -> Vec<u8> {
        let mut value = VERSION.to_vec();
        for (tag, permissions) in &self.0 {
            let (tag, id) = match *tag {
                Tag::UserObj => (0x01u16, NO_ID),
                Tag::User(id) => (0x02, id),
                Tag::GroupObj => (0x04, NO_ID),
                Tag::Group(id) => (0x08, id),
                Tag::Mask => (0x10, NO_ID),
                Tag::Other => (0x20, NO_ID),
            };
            value.extend(tag.to_le_bytes());
            value.extend(permissions.to_le_bytes());
            value.extend(id.to_le_bytes());
        }
        value
    }
}
