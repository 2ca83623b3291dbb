//! What changed on UFS is an I/O error on the reads that touch it. It never becomes
//! data, everything else stays readable, and once the bytes are right again so are
//! the reads, without mounting anew.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{Advice, fadvise};
use rustix::io::Errno;

use crate::daemon::Daemon;
use crate::fixture::{self, Layer};
use crate::{Setting, drop_caches, tree};

const PAGE: usize = 4096;
const CHUNK: u64 = 128 * 1024;

/// A file of the tiny image, three MiB long, whose bytes are nowhere else in it.
const VICTIM: &str = "app/data/random";
/// A file in the same layer that stays whole.
const BYSTANDER: &str = "app/data/greeting";

/// Wrong bytes came out of a mounted image: the one thing that must never happen.
#[derive(Debug)]
struct WrongBytes {
    offset: usize,
}

impl std::fmt::Display for WrongBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "wrong bytes were read at {} of {VICTIM}, without an error",
            self.offset
        )
    }
}

impl std::error::Error for WrongBytes {}

/// The tiny image on a UFS of its own, to be damaged.
struct Scene {
    ufs: tempfile::TempDir,
    image: fixture::Image,
    /// The layer that holds the victim.
    layer: Layer,
    /// Where the victim's bytes begin in the layer's EROFS image.
    start: u64,
    content: Vec<u8>,
}

impl Scene {
    fn new(setting: &Setting) -> Result<Self> {
        let image = fixture::image(setting, "tiny")?;
        let ufs = setting.scratch_dir()?;
        fixture::private_ufs(setting, &image, ufs.path())?;
        let layer = fixture::layers(ufs.path(), &image.digest)?
            .pop()
            .context("an image without layers")?;
        // The undamaged file is read through a mount; its place in the image is where
        // the same bytes are.
        let daemon = Daemon::start(setting, ufs.path())?;
        let mounted = daemon.mount(&image.digest)?;
        let content = std::fs::read(mounted.path().join(VICTIM))?;
        mounted.unmount()?;
        daemon.stop()?;
        let bytes = std::fs::read(&layer.erofs)?;
        let start = bytes
            .chunks(PAGE)
            .position(|block| block == &content[..PAGE])
            .context("the file's first block is not in its layer")?
            * PAGE;
        ensure!(
            bytes[start..start + content.len()] == content,
            "the file is not contiguous in its layer"
        );
        Ok(Self {
            ufs,
            image,
            layer,
            start: start as u64,
            content,
        })
    }

    /// Changes one byte of the victim on UFS, and back when called again.
    fn flip(&self, offset: u64) -> Result<()> {
        flip(&self.layer.erofs, self.start + offset)
    }

    fn open(&self, root: &Path) -> Result<File> {
        let path = root.join(VICTIM);
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        // Read-ahead would tie a page's fate to its neighbours'.
        fadvise(&file, 0, None, Advice::Random)?;
        Ok(file)
    }

    /// Reads the victim page by page. Says which pages failed; wrong bytes are an error.
    fn failing_pages(&self, file: &File) -> Result<Vec<usize>> {
        let mut failing = Vec::new();
        for (number, wanted) in self.content.chunks(PAGE).enumerate() {
            let mut page = vec![0; wanted.len()];
            match file.read_exact_at(&mut page, (number * PAGE) as u64) {
                Ok(()) if page == wanted => {}
                Ok(()) => {
                    return Err(WrongBytes {
                        offset: number * PAGE,
                    }
                    .into());
                }
                Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => {
                    failing.push(number);
                }
                Err(error) => return Err(error).with_context(|| format!("reading {VICTIM}")),
            }
        }
        Ok(failing)
    }

    /// Reads it as programs do, with read-ahead: some error, or all of it right.
    fn read_through(&self, root: &Path) -> Result<Option<std::io::Error>> {
        match std::fs::read(root.join(VICTIM)) {
            Ok(bytes) if bytes == self.content => Ok(None),
            Ok(bytes) => {
                let offset = bytes.iter().zip(&self.content).position(|(a, b)| a != b);
                Err(WrongBytes {
                    offset: offset.unwrap_or(bytes.len()),
                }
                .into())
            }
            Err(error) => Ok(Some(error)),
        }
    }

    /// Mounts the image with a daemon of its own and reads all of it: some error, or
    /// everything as in the ordinary unpack. Then `also` is asked.
    fn mount_and_compare(
        &self,
        setting: &Setting,
        also: impl FnOnce(&Daemon) -> Result<()>,
    ) -> Result<Option<String>> {
        let daemon = Daemon::start(setting, self.ufs.path())?;
        let mounted = match daemon.mount(&self.image.digest) {
            Ok(mounted) => mounted,
            Err(refused) => return Ok(Some(refused.to_string())),
        };
        let found = match tree::manifest(mounted.path()) {
            Ok(found) => found,
            Err(failed) => return Ok(Some(failed.to_string())),
        };
        if let Some(report) = tree::difference(&self.image.tree()?, &found) {
            bail!("the tree is wrong\n{report}");
        }
        also(&daemon)?;
        mounted.unmount()?;
        daemon.stop()?;
        Ok(None)
    }
}

fn flip(path: &Path, offset: u64) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 0x10], offset)?;
    file.sync_all()?;
    Ok(())
}

/// One byte differs: exactly the pages of its chunk fail.
pub fn flipped_byte(setting: &Setting) -> Result<()> {
    flipped_byte_with(setting, &setting.ublk_server())
}

fn flipped_byte_with(setting: &Setting, program: &Path) -> Result<()> {
    let scene = Scene::new(setting)?;
    let offset = 1_000_000;
    scene.flip(offset)?;

    let daemon = Daemon::start_program(setting, program, scene.ufs.path())?;
    let mounted = daemon.mount(&scene.image.digest)?;

    let chunk = offset / CHUNK;
    let pages_per_chunk = CHUNK / PAGE as u64;
    let wanted: Vec<usize> = (chunk * pages_per_chunk..(chunk + 1) * pages_per_chunk)
        .map(usize::try_from)
        .collect::<Result<_, _>>()?;
    let failing = scene.failing_pages(&scene.open(mounted.path())?)?;
    ensure!(
        failing == wanted,
        "pages {failing:?} failed, not {wanted:?}\n{}",
        daemon.log()
    );
    drop_caches()?;
    ensure!(
        scene.read_through(mounted.path())?.is_some(),
        "reading all of the file succeeded\n{}",
        daemon.log()
    );
    ensure!(
        std::fs::read(mounted.path().join(BYSTANDER))? == b"image-accel\n",
        "another file changed"
    );

    scene.flip(offset)?;
    drop_caches()?;
    let failing = scene.failing_pages(&scene.open(mounted.path())?)?;
    ensure!(
        failing.is_empty(),
        "repaired, but pages {failing:?} fail\n{}",
        daemon.log()
    );
    mounted.unmount()?;
    daemon.stop()
}

/// The image on UFS loses its end: reads there fail, reads before do not.
pub fn truncation(setting: &Setting) -> Result<()> {
    let scene = Scene::new(setting)?;
    let daemon = Daemon::start(setting, scene.ufs.path())?;
    let mounted = daemon.mount(&scene.image.digest)?;

    // An open file needs nothing of the image's metadata, which is at its end.
    let victim = scene.open(mounted.path())?;
    // In the middle of a page of the victim, so that one chunk is there by half.
    let cut = 2_000_001;
    let whole = std::fs::read(&scene.layer.erofs)?;
    let file = OpenOptions::new().write(true).open(&scene.layer.erofs)?;
    file.set_len(scene.start + cut)?;
    drop_caches()?;

    let failing = scene.failing_pages(&victim)?;
    let first = usize::try_from(cut / CHUNK * CHUNK)? / PAGE;
    let wanted: Vec<usize> = (first..scene.content.len().div_ceil(PAGE)).collect();
    ensure!(
        failing == wanted,
        "pages {failing:?} failed, not {wanted:?}\n{}",
        daemon.log()
    );

    file.write_all_at(&whole, 0)?;
    file.sync_all()?;
    drop_caches()?;
    let failing = scene.failing_pages(&victim)?;
    ensure!(
        failing.is_empty(),
        "whole again, but pages {failing:?} fail\n{}",
        daemon.log()
    );
    drop(victim);
    mounted.unmount()?;
    daemon.stop()
}

/// A byte of the index differs, anywhere: mounting or reading may fail, but what can be
/// read is right.
pub fn damaged_index(setting: &Setting) -> Result<()> {
    let scene = Scene::new(setting)?;
    let size = std::fs::metadata(&scene.layer.index)?.len();
    // The header's magic, size, root and checksum; the zero map; the tree's first
    // value and the second of its last page. The tree is needed. So is the header, unless
    // the image has a start file, which says what is in it; the zero map is a hint, with
    // which it does not matter.
    let (header, hints, tree) = ([0, 16, 24, 4064], [4096], [8192, size - 4096 + 32]);
    let noticed = |offset| {
        flip(&scene.layer.index, offset)?;
        let outcome = scene.mount_and_compare(setting, |_| Ok(()));
        flip(&scene.layer.index, offset)?;
        let outcome =
            outcome.with_context(|| format!("with byte {offset} of the index changed"))?;
        Ok::<_, anyhow::Error>(outcome.is_some())
    };
    for offset in tree {
        ensure!(
            noticed(offset)?,
            "that byte {offset} of the index was changed has gone unnoticed"
        );
    }
    // The root stands for the header here.
    for offset in [header[2], hints[0]] {
        ensure!(
            !noticed(offset)?,
            "byte {offset} of the index was needed although there is a start file"
        );
    }
    std::fs::remove_file(fixture::start_path(scene.ufs.path(), &scene.image.digest))?;
    for offset in header {
        ensure!(
            noticed(offset)?,
            "that byte {offset} of the index was changed has gone unnoticed"
        );
    }
    Ok(())
}

/// The start file is wrong, cut off or gone: the image is mounted without it, and has all
/// of its bytes.
pub fn damaged_start_file(setting: &Setting) -> Result<()> {
    /// How the daemon tells that it goes on without.
    const TOLD: &str = "mounting the image takes more of UFS than it need";
    let scene = Scene::new(setting)?;
    let path = fixture::start_path(scene.ufs.path(), &scene.image.digest);
    let whole = std::fs::read(&path)?;
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        (format!("byte {at} changed"), Some(bytes))
    };
    let cut = |to: usize| (format!("{to} bytes left"), Some(whole[..to].to_vec()));
    let last = whole.len() - 1;
    // Of the topmost layer, which comes last in it.
    let image = std::fs::read(&scene.layer.erofs)?;
    let place = |at: usize| {
        let wanted = &image[at..at + 32];
        let found = whole.windows(32).rposition(|bytes| bytes == wanted);
        found.with_context(|| format!("what the image has at {at} is not in the start file"))
    };
    // As in linux/fs/erofs/erofs_fs.h.
    let meta_blkaddr = u32::from_le_bytes(image[1024 + 40..][..4].try_into()?);
    let root_nid = u16::from_le_bytes(image[1024 + 14..][..2].try_into()?);
    let inode = usize::try_from(meta_blkaddr)? * PAGE + usize::from(root_nid) * 32;
    let (superblock, inode) = (place(1024)?, place(inode)?);
    let cases = [
        ("nothing changed".to_owned(), Some(whole.clone())),
        // The magic, the root directory's mode, the superblock's magic, the checksum.
        flipped(0),
        flipped(inode + 4),
        flipped(superblock),
        flipped(last),
        cut(0),
        cut(last),
        ("no file".to_owned(), None),
    ];
    for (what, bytes) in cases {
        let wrong = bytes.as_ref().is_some_and(|bytes| *bytes != whole);
        match bytes {
            Some(bytes) => std::fs::write(&path, bytes)?,
            None => std::fs::remove_file(&path)?,
        }
        let told = |daemon: &Daemon| {
            ensure!(
                daemon.has_said(TOLD)? == wrong,
                "whether it is used is not told as it is\n{}",
                daemon.log()
            );
            Ok(())
        };
        let outcome = scene.mount_and_compare(setting, told);
        let outcome = outcome.with_context(|| format!("the start file: {what}"))?;
        if let Some(failed) = outcome {
            bail!("the start file: {what}: {failed}");
        }
    }
    Ok(())
}

/// The check above sees what it is for: with a build that does not verify, it has to
/// find wrong bytes.
pub fn without_verification_the_check_fails(setting: &Setting) -> Result<()> {
    match flipped_byte_with(setting, &setting.unverified_ublk_server()) {
        Ok(()) => bail!("nothing was wrong although nothing was verified"),
        Err(error) if error.downcast_ref::<WrongBytes>().is_some() => Ok(()),
        Err(error) => Err(error.context("it failed, but not because of wrong bytes")),
    }
}
