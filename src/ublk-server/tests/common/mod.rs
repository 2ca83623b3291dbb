//! A UFS directory with layers made for a test.
#![allow(dead_code)] // each test uses its part

use accel_oci::{DiffId, Digest};
use accel_ufs::index::{ByteRange, CHUNK_SIZE, ChunkNo, ImageSize, IndexBuilder, Root};
use accel_ufs::names::LayerName;
use std::fs;
use std::path::Path;

/// Bytes that look random and are the same each time.
pub fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// A layer on the test's UFS.
#[derive(Debug, Clone, Copy)]
pub struct Layer {
    pub name: LayerName,
    pub root: Root,
    pub size: ImageSize,
}

/// Publishes `image` as the EROFS image of the layer `name`, whatever it holds.
pub fn publish(ufs: &Path, name: &str, image: &[u8]) -> Layer {
    let name = LayerName::Layer(DiffId(Digest::of(name.as_bytes())));
    let mut builder = IndexBuilder::new();
    for (number, chunk) in (0..).zip(image.chunks(CHUNK_SIZE)) {
        builder.add(ChunkNo(number), chunk).unwrap();
    }
    let size = image.len() as u64;
    let metadata = ByteRange::new(size - 4096, 4096);
    let (root, index) = builder.finish(size, metadata).unwrap();
    for (path, bytes) in [(name.image(), image), (name.index(), &*index)] {
        let path = path.beneath(ufs);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    let size = ImageSize::new(size).unwrap();
    Layer { name, root, size }
}
