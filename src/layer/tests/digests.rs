//! Compression, digests, and which error comes first.

mod common;

use accel_layer::{Compression, Expected, LayerError, LayerOptions, NoLower, image_uuid};
use accel_oci::{ChainId, DiffId, Digest};
use common::{Tar, convert, convert_with};
use sha2::{Digest as _, Sha256};
use std::io::{self, Read, Write};

fn tar() -> Vec<u8> {
    let data: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
    Tar::default()
        .file("large", &data)
        .file("small", b"x")
        .end()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn options(digest: Option<Digest>, size: Option<u64>, diff_id: Option<DiffId>) -> LayerOptions {
    let mut options = LayerOptions::new("sha256:abc");
    options.expected = Expected {
        digest,
        size,
        diff_id,
    };
    options
}

#[test]
fn every_compression_gives_the_same_image() {
    let tar = tar();
    let (left, right) = tar.split_at(tar.len() / 3);
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
    // A skippable frame, as the seekable variants of zstd layers have.
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"123"].concat();
    let (plain, image) = convert(&tar).unwrap();
    for (what, blob) in [
        ("gzip", gzip(&tar)),
        (
            "gzip members",
            [gzip(left), gzip(right), gzip(b"")].concat(),
        ),
        // Members for pieces of files, the last one empty, with an extra field.
        ("eStargz", {
            let footer = flate2::GzBuilder::new()
                .extra(*b"SG\x16\x00000000000000a5c8STARGZ")
                .write(vec![], flate2::Compression::none());
            [gzip(left), gzip(right), footer.finish().unwrap()].concat()
        }),
        ("zstd", zstd(&tar)),
        // Frames for pieces of files, then what is about them in frames to skip.
        (
            "zstd:chunked",
            [
                zstd(left),
                zstd(right),
                skippable.clone(),
                skippable.clone(),
            ]
            .concat(),
        ),
        (
            "zstd frames",
            [zstd(left), skippable.clone(), zstd(right)].concat(),
        ),
        (
            "zstd, skippable first",
            [skippable.clone(), zstd(&tar), skippable].concat(),
        ),
    ] {
        let (summary, other) = convert(&blob).unwrap_or_else(|e| panic!("{what}: {e:?}"));
        assert!(image == other, "{what}");
        assert_eq!(summary.diff_id, plain.diff_id, "{what}");
        assert_eq!(summary.digest, Digest::of(&blob), "{what}");
        assert_eq!(summary.size, blob.len() as u64, "{what}");
        assert_eq!(summary.tar_size, tar.len() as u64, "{what}");
    }
    assert_eq!(plain.diff_id, DiffId(Digest::of(&tar)));
}

/// A window beyond the 128 MiB that libzstd reads without being asked to.
#[test]
fn zstd_refers_back_as_far_as_its_window_reaches() {
    let distance = 160 << 20;
    // Nothing that is alike but 4 MiB, twice.
    let noise: Vec<u8> = (0..1u32 << 17)
        .flat_map(|n| *blake3::hash(&n.to_le_bytes()).as_bytes())
        .collect();
    let size = distance + noise.len() as u64;
    let mut start = Tar::default();
    start.raw(common::header(b"f", b'0', size), b"");
    let mut tar = io::Cursor::new(start.open_end())
        .chain(&noise[..])
        .chain(io::repeat(0).take(distance - noise.len() as u64))
        .chain(&noise[..])
        .chain(&[0; 1024][..]);
    let mut encoder = zstd::Encoder::new(vec![], 1).unwrap();
    encoder.window_log(28).unwrap();
    encoder.long_distance_matching(true).unwrap();
    let mut hashing = Hashing(Sha256::new(), encoder);
    io::copy(&mut tar, &mut hashing).unwrap();
    let Hashing(hasher, encoder) = hashing;
    let diff_id = DiffId(Digest::from_bytes(hasher.finalize().into()));
    let blob = encoder.finish().unwrap();
    assert!(blob.len() < noise.len() * 3 / 2, "it does not refer back");
    let options = options(Some(Digest::of(&blob)), None, Some(diff_id));
    let mut lower = NoLower;
    let summary = accel_layer::convert_layer(&blob[..], &options, &mut lower, Nowhere).unwrap();
    assert!(summary.image.size > size);
}

#[test]
fn what_follows_the_tar_belongs_to_the_diff_id() {
    let tar = [tar(), vec![7; 600_000]].concat();
    let (summary, _) = convert(&gzip(&tar)).unwrap();
    assert_eq!(summary.diff_id, DiffId(Digest::of(&tar)));
}

#[test]
fn the_name_depends_on_what_is_below_only_if_the_tree_does() {
    let own = Tar::default().dir("a", 0o755).file("a/f", b"").end();
    let implied = Tar::default().file("a/f", b"").end();
    let parent = ChainId(Digest::of(b"parent"));
    let mut options = LayerOptions::new("test");
    options.parent = Some(parent);
    for (tar, needs_lower) in [(own, false), (implied, true)] {
        let diff_id = DiffId(Digest::of(&tar));
        let chain_id = ChainId::new(Some(parent), diff_id);
        let (summary, image) = convert_with(&tar, &options, &mut NoLower).unwrap();
        assert_eq!(summary.needs_lower, needs_lower);
        assert_eq!(summary.chain_id, chain_id);
        let name = if needs_lower { chain_id.0 } else { diff_id.0 };
        assert_eq!(summary.uuid, image_uuid(&name));
        assert_eq!(image[1024 + 48..1024 + 64], summary.uuid.0);
    }
}

#[test]
fn what_was_expected_and_found_is_fine() {
    let tar = tar();
    let blob = gzip(&tar);
    let mut options = options(
        Some(Digest::of(&blob)),
        Some(blob.len() as u64),
        Some(DiffId(Digest::of(&tar))),
    );
    options.compression = Some(Compression::Gzip);
    convert_with(&blob, &options, &mut NoLower).unwrap();
}

#[test]
fn a_mismatch_names_the_layer() {
    let tar = tar();
    let other = Digest::of(b"other");
    let text = |options: &LayerOptions, blob: &[u8]| {
        let error = convert_with(blob, options, &mut NoLower).unwrap_err();
        assert!(error.to_string().contains("layer sha256:abc"), "{error}");
        error
    };
    let error = text(&options(Some(other), None, None), &tar);
    assert!(
        matches!(error, LayerError::Digest { expected, .. } if expected == other),
        "{error}"
    );
    let error = text(&options(None, None, Some(DiffId(other))), &tar);
    assert!(matches!(error, LayerError::DiffId { .. }), "{error}");
    let error = text(&options(None, Some(tar.len() as u64 + 1), None), &tar);
    assert!(matches!(error, LayerError::Size { .. }), "{error}");
    let error = text(&options(None, Some(1000), None), &tar);
    assert!(
        matches!(error, LayerError::Size { expected: 1000, .. }),
        "{error}"
    );
}

#[test]
fn wrong_bytes_are_the_first_cause_of_what_follows_from_them() {
    let tar = tar();
    let blob = gzip(&tar);
    let digest = Digest::of(&blob);
    let mut damaged = blob.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x10;
    let error = convert_with(&damaged, &options(Some(digest), None, None), &mut NoLower);
    assert!(matches!(error, Err(LayerError::Digest { .. })), "{error:?}");
    // Without a digest to compare with, the stream itself.
    let error = convert(&damaged);
    assert!(
        matches!(error, Err(LayerError::Decompress { .. })),
        "{error:?}"
    );
    // A tar that is none, whose bytes are as expected.
    let error = convert_with(
        &[1; 5000],
        &options(Some(Digest::of(&[1; 5000])), None, None),
        &mut NoLower,
    );
    assert!(matches!(error, Err(LayerError::Tar { .. })), "{error:?}");
    let error = convert_with(&[1; 5000], &options(Some(digest), None, None), &mut NoLower);
    assert!(matches!(error, Err(LayerError::Digest { .. })), "{error:?}");
}

#[test]
fn a_blob_that_ends_early_is_no_layer() {
    let tar = tar();
    for blob in [gzip(&tar), zstd::encode_all(&*tar, 1).unwrap()] {
        let error = convert(&blob[..blob.len() - 5]);
        assert!(
            matches!(error, Err(LayerError::Decompress { .. })),
            "{error:?}"
        );
    }
}

#[test]
fn the_media_type_must_say_what_the_bytes_are() {
    for (media_type, compression) in [
        ("application/vnd.oci.image.layer.v1.tar", Compression::None),
        (
            "application/vnd.oci.image.layer.v1.tar+gzip",
            Compression::Gzip,
        ),
        (
            "application/vnd.oci.image.layer.v1.tar+zstd",
            Compression::Zstd,
        ),
        (
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            Compression::Gzip,
        ),
        (
            "application/vnd.docker.image.rootfs.diff.tar",
            Compression::None,
        ),
        (
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            Compression::Gzip,
        ),
        (
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            Compression::Gzip,
        ),
    ] {
        assert_eq!(Compression::from_media_type(media_type), Ok(compression));
    }
    for media_type in [
        "application/vnd.erofs.layer.v1",
        "application/vnd.oci.image.layer.v1.tar+xz",
        "",
    ] {
        assert!(Compression::from_media_type(media_type).is_err());
    }
    let mut options = LayerOptions::new("test");
    options.compression = Some(Compression::Zstd);
    let error = convert_with(&gzip(&tar()), &options, &mut NoLower).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("says zstd") && text.contains("say gzip"),
        "{text}"
    );
}

/// Gives some bytes, then an error.
struct Breaks(io::Cursor<Vec<u8>>);

impl Read for Breaks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer)? {
            0 => Err(io::Error::other("the line is dead")),
            len => Ok(len),
        }
    }
}

#[test]
fn a_reader_that_breaks_is_what_is_reported() {
    let blob = gzip(&tar());
    let half = blob.len() / 2;
    for blob in [
        blob[..half].to_vec(),
        blob[..2].to_vec(),
        tar()[..100_000].to_vec(),
    ] {
        let reader = Breaks(io::Cursor::new(blob));
        let options = options(Some(Digest::of(b"")), None, None);
        let mut lower = NoLower;
        let error =
            accel_layer::convert_layer(reader, &options, &mut lower, common::Memory::default());
        assert!(matches!(error, Err(LayerError::Read { .. })), "{error:?}");
        assert!(common::chain(&error.unwrap_err()).contains("the line is dead"));
    }
}

/// Hashes what goes through it.
struct Hashing<W>(Sha256, W);

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        self.1.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.1.flush()
    }
}

/// Takes an image and keeps nothing.
struct Nowhere;

impl accel_layer::Output for Nowhere {
    type Error = io::Error;

    fn write_at(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// Refuses a chunk.
struct Full;

impl accel_layer::Output for Full {
    type Error = io::Error;

    fn write_at(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::Error::other("no space"))
    }
}

#[test]
fn an_output_that_fails_ends_the_conversion() {
    let options = options(Some(Digest::of(b"")), None, None);
    let error = accel_layer::convert_layer(io::Cursor::new(tar()), &options, &mut NoLower, Full);
    assert!(matches!(error, Err(LayerError::Write { .. })), "{error:?}");
}
