//! A UFS directory with layers made for a test.
#![allow(dead_code)] // each test uses its part

pub mod node;

use accel_oci::{DiffId, Digest};
use accel_ufs::index::{
    ByteRange, CHUNK_SIZE, ChunkNo, Header, ImageSize, IndexBuilder, Layout, PAGE_SIZE, Page, Root,
};
use accel_ufs::names::LayerName;
use accel_ufs::start::{Block, LayerStart};
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
    // Of a large one more than what is read of it for the mount.
    let metadata = if size > 1 << 20 { 3 << 17 } else { 4096 };
    let metadata = ByteRange::new(size - metadata, metadata);
    let (root, index) = builder.finish(size, metadata).unwrap();
    for (path, bytes) in [(name.image(), image), (name.index(), &*index)] {
        let path = path.beneath(ufs);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    let size = ImageSize::new(size).unwrap();
    Layer { name, root, size }
}

/// What a mount reads of a layer that was published, of its `image`.
pub fn start_of(ufs: &Path, layer: &Layer, image: &[u8]) -> LayerStart {
    let index = fs::read(layer.name.index().beneath(ufs)).unwrap();
    let page = |at: u64| {
        let at = usize::try_from(at).unwrap();
        <&Page>::try_from(&index[at..at + PAGE_SIZE]).unwrap()
    };
    let metadata = Header::parse(page(0)).unwrap().metadata();
    let layout = Layout::new(layer.size);
    let blocks = LayerStart::wanted(metadata).map(|number| {
        let at = usize::try_from(number).unwrap() * PAGE_SIZE;
        let bytes = Box::new(*<&Page>::try_from(&image[at..at + PAGE_SIZE]).unwrap());
        let chunk = at / CHUNK_SIZE * CHUNK_SIZE;
        let chunk = &image[chunk..image.len().min(chunk + CHUNK_SIZE)];
        let pages = |at| Ok::<_, std::convert::Infallible>(*page(at));
        let proof = layout.prove_block(layer.root, number, chunk, pages);
        (Block { number, bytes }, proof.unwrap())
    });
    LayerStart::new(layer.root, layer.size, metadata, blocks.collect()).unwrap()
}

use accel_oci::{ChainId, Platform};
use accel_ufs::names;
use accel_ufs::record::{ErofsRecord, ImageRecord, LayerRecord, NameRecord, Process};
use rustix::event::{PollFd, PollFlags};
use rustix::mount::{MountFlags, UnmountFlags, mount};
use std::ffi::CString;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::thread::JoinHandle;

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

/// Notes that an image was converted through an index; the index's digest.
pub fn name_index(ufs: &Path, manifest: Digest) -> Digest {
    let index = Digest::of(b"an index");
    let record = NameRecord {
        layout: 1,
        source: index.to_string(),
        manifest,
    };
    let path = names::name_record(&index, names::Nanoseconds(1)).beneath(ufs);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, record.to_json()).unwrap();
    index
}

fn platform() -> Platform {
    serde_json::from_str(r#"{"os": "linux", "architecture": "amd64"}"#).unwrap()
}

/// A directory on storage that stalls: a FUSE file system whose server takes every
/// request and answers none but the first. Whoever asks it anything waits, and
/// cannot be killed.
#[derive(Debug)]
pub struct Stalled {
    directory: tempfile::TempDir,
    /// The server ends, and with it all who wait, when this is closed.
    end: Option<OwnedFd>,
    server: Option<JoinHandle<()>>,
}

impl Stalled {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
            device.as_raw_fd()
        );
        let options = CString::new(options).unwrap();
        let flags = MountFlags::RDONLY;
        mount("stalled", directory.path(), "fuse", flags, &*options).unwrap();
        let (end, ended) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let server = std::thread::spawn(move || stall(&device, &end));
        Self {
            directory,
            end: Some(ended),
            server: Some(server),
        }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

fn stall(mut device: &File, end: &OwnedFd) {
    const INIT: u32 = 26;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut polled = [
            PollFd::new(&device, PollFlags::IN),
            PollFd::new(end, PollFlags::IN),
        ];
        rustix::event::poll(&mut polled, None).unwrap();
        if !polled[1].revents().is_empty() {
            return;
        }
        let Ok(len) = device.read(&mut buffer) else {
            continue;
        };
        // struct fuse_in_header: len, opcode, unique, …; INIT's reply begins with
        // the version.
        let request = &buffer[..len];
        if u32::from_ne_bytes(request[4..8].try_into().unwrap()) == INIT {
            let mut reply = [0; 80];
            reply[..4].copy_from_slice(&80_u32.to_ne_bytes());
            reply[8..16].copy_from_slice(&request[8..16]);
            reply[16..20].copy_from_slice(&7_u32.to_ne_bytes());
            reply[20..24].copy_from_slice(&31_u32.to_ne_bytes());
            device.write_all(&reply).unwrap();
        }
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.directory.path(), UnmountFlags::DETACH);
        drop(self.end.take());
        let _ = self.server.take().unwrap().join();
    }
}
