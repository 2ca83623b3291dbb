//! Arbitrary bytes as a layer's blob. An error is fine if it names the layer; an
//! image that comes out must be whole.

use accel_layer::{
    Attributes, LayerOptions, LowerDirectory, LowerError, LowerLookup, Output, convert_layer,
};
use accel_oci::{ChainId, Digest};
use std::convert::Infallible;

/// The most bytes of an image: a sparse file may claim any size.
const MAX_IMAGE: u64 = 1 << 20;

/// An image in memory.
#[derive(Default)]
struct Memory(Vec<u8>);

impl Output for Memory {
    type Error = Infallible;

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Infallible> {
        let start = usize::try_from(offset).expect("within MAX_IMAGE");
        let end = start + bytes.len();
        assert!(end as u64 <= MAX_IMAGE, "larger than it may be");
        self.0.resize(self.0.len().max(end), 0);
        self.0[start..end].copy_from_slice(bytes);
        Ok(())
    }
}

/// Layers below that have directories, other files and nothing.
struct Below;

impl LowerLookup for Below {
    fn directory(&mut self, path: &[&[u8]]) -> Result<LowerDirectory, LowerError> {
        let last = path.last().and_then(|name| name.last());
        Ok(match last.map_or(0, |byte| byte % 3) {
            0 => LowerDirectory::Absent,
            1 => LowerDirectory::Replaced,
            _ => LowerDirectory::Found(Attributes {
                permissions: accel_erofs::Permissions::of_mode(0o2775),
                uid: 7,
                gid: 8,
                mtime: accel_erofs::Timestamp::EPOCH,
                xattrs: accel_erofs::Xattrs::new(),
            }),
        })
    }
}

/// Runs one input.
pub fn run(blob: &[u8]) {
    let mut options = LayerOptions::new("fuzzed");
    options.max_image_size = MAX_IMAGE;
    // The lowest layer of an image is read otherwise than others.
    if blob.len() % 1024 < 512 {
        options.parent = Some(ChainId(Digest::of(b"")));
    }
    let mut memory = Memory::default();
    match convert_layer(blob, &options, &mut Below, &mut memory) {
        Err(error) => assert!(error.to_string().contains("layer fuzzed"), "{error}"),
        Ok(summary) => {
            assert_eq!(summary.size, blob.len() as u64);
            assert_eq!(summary.image.size, memory.0.len() as u64);
            let found = super::erofs::check(&memory.0).expect("a whole image");
            assert_eq!(found, summary.image.counts.inodes);
        }
    }
}
