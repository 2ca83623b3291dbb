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

use accel_oci::{ChainId, Platform};
use accel_ufs::names;
use accel_ufs::record::{ErofsRecord, ImageRecord, LayerRecord, Process};
use std::path::PathBuf;
use std::process::Command;

/// A file or directory of a test's layer: path, content (`None`: a directory).
pub type Entry<'a> = (&'a str, Option<&'a [u8]>);

/// Makes an EROFS image with Debian's mkfs.erofs and publishes it.
pub fn publish_tree(ufs: &Path, name: &str, entries: &[Entry<'_>]) -> Layer {
    let scratch = tempfile::tempdir().unwrap();
    let (tree, file) = (scratch.path().join("tree"), scratch.path().join("image"));
    fs::create_dir(&tree).unwrap();
    for (path, content) in entries {
        let path = tree.join(path);
        match content {
            Some(content) => {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, content).unwrap();
            }
            None => fs::create_dir_all(path).unwrap(),
        }
    }
    let uuid = LayerName::Layer(DiffId(Digest::of(name.as_bytes()))).uuid();
    let made = Command::new("mkfs.erofs")
        .args(["-T0", "-U", &uuid.to_string()])
        .args([&file, &tree])
        .output()
        .expect("mkfs.erofs (Debian's erofs-utils) is needed");
    assert!(made.status.success(), "{made:?}");
    publish(ufs, name, &fs::read(file).unwrap())
}

/// Publishes an image record of these layers (lowest first); its digest.
pub fn publish_image(ufs: &Path, layers: &[Layer]) -> Digest {
    let mut chain = None;
    let mut text = String::new();
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| {
            let LayerName::Layer(diff_id) = layer.name else {
                panic!("a chain");
            };
            let chain_id = ChainId::new(chain, diff_id);
            chain = Some(chain_id);
            text += &chain_id.to_string();
            LayerRecord {
                diff_id,
                chain_id,
                digest: diff_id.0,
                media_type: "application/vnd.oci.image.layer.v1.tar".to_owned(),
                size: 1,
                erofs: ErofsRecord {
                    path: layer.name.image(),
                    root: layer.root,
                    size: layer.size,
                    uuid: layer.name.uuid(),
                    index_size: accel_ufs::index::Layout::new(layer.size).index_size(),
                },
            }
        })
        .collect();
    let manifest = Digest::of(text.as_bytes());
    let record = ImageRecord {
        layout: 1,
        manifest,
        config: manifest,
        platform: platform(),
        source: "oci:/test".to_owned(),
        process: Process::default(),
        layers,
    };
    let path: PathBuf = names::image_record(&manifest).beneath(ufs);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, record.to_json()).unwrap();
    manifest
}

fn platform() -> Platform {
    serde_json::from_str(r#"{"os": "linux", "architecture": "amd64"}"#).unwrap()
}
