//! Our own reader: finds what was written, and takes any damage for an error.
#![allow(clippy::cast_possible_truncation)] // sizes here are small

mod common;

use accel_erofs::{Inode, Input, ReadError, Reader};
use common::{Picture, build, trees};
use proptest::{prelude::*, sample::Index};
use std::io;

struct Bytes<'a>(&'a [u8]);

impl Input for Bytes<'_> {
    type Error = io::Error;

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let part = self.0.get(start..).and_then(|rest| rest.get(..bytes.len()));
        bytes.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

type Result<T> = std::result::Result<T, ReadError<io::Error>>;

fn find(reader: &Reader<Bytes<'_>>, path: &[u8]) -> Result<Option<Inode>> {
    let mut inode = reader.root()?;
    for name in path.split(|byte| *byte == b'/').skip(1) {
        match reader.lookup(&inode, name)? {
            Some(child) => inode = child,
            None => return Ok(None),
        }
    }
    Ok(Some(inode))
}

/// Looks every path up; whatever comes must be an answer or an error.
fn read_all(image: &[u8], picture: &Picture) -> Result<()> {
    let reader = Reader::open(Bytes(image))?;
    for path in picture.keys() {
        if let Ok(Some(inode)) = find(&reader, path) {
            let _ = reader.attributes(&inode);
            let _ = reader.symlink(&inode);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn every_file_is_found_with_its_attributes(wanted in trees(60)) {
        let built = build(&wanted);
        let reader = Reader::open(Bytes(&built.image)).unwrap();
        prop_assert_eq!(reader.uuid(), common::UUID);
        for (path, seen) in &built.picture {
            let inode = find(&reader, path).unwrap().expect("the path is found");
            let attributes = reader.attributes(&inode).unwrap();
            prop_assert_eq!(inode.kind().mode_bits() | attributes.permissions.bits(), seen.mode);
            prop_assert_eq!((attributes.uid, attributes.gid), (seen.uid, seen.gid));
            let mtime = (attributes.mtime.seconds(), attributes.mtime.nanos());
            prop_assert_eq!(mtime, seen.mtime);
            let xattrs = attributes.xattrs.iter().map(|(name, value)| (name.full(), value.to_vec()));
            prop_assert_eq!(&xattrs.collect::<std::collections::BTreeMap<_, _>>(), &seen.xattrs);
            if let Some(target) = reader.symlink(&inode).unwrap() {
                prop_assert_eq!(target.as_bytes(), &seen.data[..]);
            }
            let missing = [&path[..], b"/not there"].concat();
            prop_assert!(find(&reader, &missing).unwrap().is_none());
        }
    }

    #[test]
    fn damage_is_an_error_at_most(
        wanted in trees(30),
        flips in prop::collection::vec((any::<Index>(), any::<u8>()), 1..200),
        cut in any::<Index>(),
    ) {
        let built = build(&wanted);
        let mut image = built.image.clone();
        let metadata = built.summary.metadata.start as usize..image.len();
        for (at, value) in flips {
            image[metadata.start + at.index(metadata.len())] = value;
        }
        read_all(&image, &built.picture).unwrap();
        let _ = read_all(&image[..cut.index(image.len())], &built.picture);
    }
}

#[test]
fn what_is_no_image_of_layout_1_is_refused() {
    let good = build(&[]).image;
    for (at, problem) in [
        (1024, "magic"),
        (1024 + 80, "feature"),
        (1024 + 48, "checksum"),
    ] {
        let mut image = good.clone();
        image[at] ^= 1;
        let error = Reader::open(Bytes(&image)).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains(problem), "{error}");
    }
}
