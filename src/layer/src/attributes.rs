//! What the attributes of a file become when it is made and when an entry is
//! applied to it, as the kernel's calls leave them: `open` or `mkdir`, `lchown`,
//! `lsetxattr`, `chmod`.

use crate::{
    acl::{self, Acl},
    archive::Entry,
    error::EntryProblem,
};
use accel_erofs::{Attributes, FileKind, Permissions, Timestamp, XattrError, XattrName, Xattrs};

const CAPABILITY: &[u8] = b"security.capability";
/// An owner or group that `chown(2)` leaves as it is.
const UNCHANGED: u32 = u32::MAX;

/// A directory that nobody described.
pub fn new_directory() -> Attributes {
    Attributes {
        permissions: Permissions::of_mode(0o755),
        uid: 0,
        gid: 0,
        mtime: Timestamp::EPOCH,
        xattrs: Xattrs::new(),
    }
}

/// Of a new file in a directory with the attributes `above`: a directory's group
/// and default ACL are inherited. The mode is to be set.
pub fn born(above: &Attributes, kind: FileKind) -> Result<Attributes, EntryProblem> {
    let mut attributes = new_directory();
    if above.permissions.bits() & 0o2000 != 0 {
        attributes.gid = above.gid;
    }
    if kind != FileKind::Symlink
        && let Some(value) = get(&above.xattrs, acl::DEFAULT)?
        && let Ok(Some(inherited)) = Acl::parse(value)
    {
        if kind == FileKind::Directory {
            set(&mut attributes.xattrs, acl::DEFAULT, value)?;
        }
        if !inherited.is_mode() {
            set(&mut attributes.xattrs, acl::ACCESS, value)?;
        }
    }
    Ok(attributes)
}

/// Sets owner and group.
pub fn chown(
    attributes: &mut Attributes,
    kind: FileKind,
    entry: &Entry,
) -> Result<(), EntryProblem> {
    let uid = id("owner", entry.uid)?;
    let gid = id("group", entry.gid)?;
    if uid != UNCHANGED {
        attributes.uid = uid;
    }
    if gid != UNCHANGED {
        attributes.gid = gid;
    }
    // Whoever the file is given to must not have the power that it had.
    if kind != FileKind::Directory {
        remove(&mut attributes.xattrs, CAPABILITY)?;
    }
    Ok(())
}

/// Sets permissions.
pub fn chmod(attributes: &mut Attributes, permissions: Permissions) -> Result<(), EntryProblem> {
    attributes.permissions = permissions;
    if let Some(value) = get(&attributes.xattrs, acl::ACCESS)?
        && let Ok(Some(mut acl)) = Acl::parse(value)
    {
        acl.set_mode(permissions.bits());
        set(&mut attributes.xattrs, acl::ACCESS, &acl.value())?;
    }
    Ok(())
}

/// Sets an extended attribute. Says whether it was; it is left out if it is
/// `trusted.*` or if Linux has no such attribute for such a file.
pub fn set_xattr(
    attributes: &mut Attributes,
    kind: FileKind,
    name: &[u8],
    value: &[u8],
) -> Result<bool, EntryProblem> {
    let is_acl = name == acl::ACCESS || name == acl::DEFAULT;
    let possible = match kind {
        FileKind::File | FileKind::Directory => true,
        FileKind::Symlink => !is_acl && !name.starts_with(b"user."),
        _ => !name.starts_with(b"user."),
    };
    if !possible || name.starts_with(b"trusted.") || (is_acl && Acl::is_foreign(value)) {
        return Ok(false);
    }
    let xattr = match XattrName::new(name) {
        Ok(xattr) => xattr,
        Err(XattrError::Namespace { .. }) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let invalid = |reason| EntryProblem::XattrValue {
        name: String::from_utf8_lossy(name).into_owned(),
        reason,
    };
    if name == CAPABILITY && !is_capability(value) {
        return Err(invalid("is no capability of version 2 or 3"));
    }
    if !is_acl {
        attributes.xattrs.insert(xattr, value)?;
        return Ok(true);
    }
    let acl = Acl::parse(value).map_err(invalid)?;
    match acl {
        Some(_) if name == acl::DEFAULT && kind != FileKind::Directory => {
            return Err(invalid("is a default ACL of what is no directory"));
        }
        Some(acl) if name == acl::DEFAULT || !acl.is_mode() => {
            attributes.xattrs.insert(xattr, &acl.value())?;
        }
        // The mode says it all.
        _ => attributes.xattrs.retain(|other| *other != xattr),
    }
    Ok(true)
}

/// Whether `setxattr(2)` takes it.
fn is_capability(value: &[u8]) -> bool {
    // The version is in the highest byte of the first 32 bits.
    matches!((value.len(), value.get(3)), (20, Some(2)) | (24, Some(3)))
}

/// An owner or group; -2 is 4294967294, as `chown(2)` takes it.
fn id(field: &'static str, value: i64) -> Result<u32, EntryProblem> {
    u32::try_from(value)
        .or_else(|_| i32::try_from(value).map(i32::cast_unsigned))
        .map_err(|_| EntryProblem::Number {
            field,
            value,
            max: u32::MAX.into(),
        })
}

/// A time within what containerd sets: others become 1970-01-01.
pub fn clamp((seconds, nanos): (i64, u32)) -> Timestamp {
    // The last nanosecond that fits 63 bits.
    const LAST: (i64, u32) = (i64::MAX / 1_000_000_000, (i64::MAX % 1_000_000_000) as u32);
    if seconds < 0 || (seconds, nanos) > LAST {
        return Timestamp::EPOCH;
    }
    Timestamp::new(seconds, nanos).unwrap_or(Timestamp::EPOCH)
}

fn get<'a>(xattrs: &'a Xattrs, name: &[u8]) -> Result<Option<&'a [u8]>, EntryProblem> {
    if xattrs.is_empty() {
        return Ok(None);
    }
    Ok(xattrs.get(&XattrName::new(name)?))
}

fn set(xattrs: &mut Xattrs, name: &[u8], value: &[u8]) -> Result<(), EntryProblem> {
    Ok(xattrs.insert(XattrName::new(name)?, value)?)
}

fn remove(xattrs: &mut Xattrs, name: &[u8]) -> Result<(), EntryProblem> {
    if !xattrs.is_empty() {
        let name = XattrName::new(name)?;
        xattrs.retain(|other| *other != name);
    }
    Ok(())
}
