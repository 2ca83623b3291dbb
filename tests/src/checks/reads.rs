//! An exported device or file has exactly the bytes of the published EROFS image,
//! whatever sizes and alignments it is read with.

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::OFlags;

use crate::daemon::Daemon;
use crate::fixture::{Image, Layer, layers};
use crate::random::Random;
use crate::{Setting, drop_caches};

const CHUNK: u64 = 128 * 1024;
const LARGEST: u64 = 1024 * 1024;
const RANDOM_READS: usize = 300;

/// Every layer of the image.
pub fn device_has_the_published_bytes(setting: &Setting, image: &Image) -> Result<()> {
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let devices = daemon.attach(&image.source)?;
    let layers = layers(&setting.ufs(), &image.digest)?;
    ensure!(
        devices.len() == layers.len(),
        "{} devices for {} layers",
        devices.len(),
        layers.len()
    );
    for (device, layer) in devices.iter().zip(&layers) {
        compare(device, layer)
            .with_context(|| format!("{} of layer {}", device.display(), layer.diff_id))
            .with_context(|| daemon.log())?;
    }
    daemon.detach(&image.source)?;
    daemon.stop()
}

fn compare(device: &Path, layer: &Layer) -> Result<()> {
    let published = File::open(&layer.erofs)?;
    let size = published.metadata()?.len();
    let mut buffered = File::open(device)?;
    let found = buffered.seek(SeekFrom::End(0))?;
    ensure!(
        found == size,
        "it has {found} bytes, the published file {size}"
    );

    for (offset, length) in edges(size) {
        same(&buffered, &published, offset, length)?;
    }
    let mut random = Random::new(size);
    for _ in 0..RANDOM_READS {
        let length = some_length(&mut random);
        same(&buffered, &published, random.below(size), length)?;
    }
    drop(buffered);
    drop_caches()?;

    // Past the page cache, in the units that the device has.
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(device)
        .context("opening with O_DIRECT")?;
    // A file says ENOTTY: it takes whatever the file system below it does.
    let smallest = rustix::fs::ioctl_blksszget(&direct).map_or(512, u64::from);
    for _ in 0..RANDOM_READS {
        let unit = [smallest, 4096][usize::from(random.below(2) == 1)];
        let offset = random.below(size / unit) * unit;
        let length = some_length(&mut random).next_multiple_of(unit);
        same(&direct, &published, offset, length)?;
    }
    Ok(())
}

/// A length of any order of magnitude, not mostly a large one.
fn some_length(random: &mut Random) -> u64 {
    let limit = 1 << random.below(u64::from(LARGEST.ilog2()) + 1);
    1 + random.below(limit)
}

/// (offset, length) around the ends of chunks and of the device.
fn edges(size: u64) -> Vec<(u64, u64)> {
    let chunks = size.div_ceil(CHUNK);
    let ends = [0, 1, 2, chunks / 2, chunks.saturating_sub(1), chunks]
        .map(|chunk| (chunk * CHUNK).min(size));
    let mut edges = Vec::new();
    for end in ends.into_iter().chain([size]) {
        for before in [0, 1, 511, 512, 4095, 4096, 4097, CHUNK] {
            for length in [1, 2, 512, 4096, 8193, CHUNK, 2 * CHUNK + 1] {
                edges.push((end.saturating_sub(before), length));
            }
        }
    }
    edges.sort_unstable();
    edges.dedup();
    edges
}

/// Reads the range from both; beyond the end both have to be short alike.
fn same(device: &File, published: &File, offset: u64, length: u64) -> Result<()> {
    let mut wanted = vec![0; usize::try_from(length)?];
    // O_DIRECT wants an aligned buffer: take one that has room to begin on a page.
    let mut room = vec![0xa5; wanted.len() + 4096];
    let start = room.as_ptr().align_offset(4096);
    let found = &mut room[start..start + wanted.len()];
    let expected = read_fully(published, &mut wanted, offset)?;
    let got = read_fully(device, found, offset)
        .with_context(|| format!("reading {length} bytes at {offset}"))?;
    ensure!(
        got == expected,
        "reading {length} bytes at {offset} gave {got}, not {expected}"
    );
    if let Some(at) = wanted[..got]
        .iter()
        .zip(found.iter())
        .position(|(a, b)| a != b)
    {
        anyhow::bail!(
            "reading {length} bytes at {offset}: byte {at} is {:#x}, not {:#x}",
            found[at],
            wanted[at]
        );
    }
    Ok(())
}

fn read_fully(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file stands for the device: right bytes pass, a single wrong one does not.
    #[test]
    fn one_wrong_byte_is_found() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let mut random = Random::new(1);
        let bytes: Vec<u8> = (0..300 * 4096)
            .map(|_| random.next_u64().to_le_bytes()[0])
            .collect();
        let (erofs, device) = (dir.path().join("a.erofs"), dir.path().join("device"));
        std::fs::write(&erofs, &bytes).unwrap();
        std::fs::write(&device, &bytes).unwrap();
        let layer = Layer {
            diff_id: String::new(),
            index: erofs.with_extension("idx"),
            erofs,
        };
        let published = File::open(&layer.erofs).unwrap();
        let reads = |device: &Path| -> Result<()> {
            let file = File::open(device)?;
            edges(bytes.len() as u64)
                .into_iter()
                .try_for_each(|(offset, length)| same(&file, &published, offset, length))
        };
        reads(&device).unwrap();
        let mut damaged = bytes.clone();
        damaged[131_072] ^= 1;
        std::fs::write(&device, &damaged).unwrap();
        assert!(reads(&device).unwrap_err().to_string().contains("byte"));
    }
}
