//! A layer is read once, and what is held of it in memory does not grow with it.

mod common;

use common::noise;
use flate2::{Compression, write::GzEncoder};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

/// What a layer in work may take besides its directory tree, in KiB.
const LIMIT: u32 = 100 << 10;

/// A gzip layer with one file of `zeros` bytes of zeros and one of noise.
fn write_layer(path: &Path, zeros: u64) {
    let gzip = GzEncoder::new(File::create(path).unwrap(), Compression::fast());
    let mut tar = tar::Builder::new(gzip);
    let mut add = |name: &str, size: u64, data: &mut dyn Read| {
        let mut header = tar::Header::new_ustar();
        header.set_size(size);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, data).unwrap();
    };
    add("zeros", zeros, &mut io::repeat(0).take(zeros));
    let noise = noise(1, 20 << 20);
    add("noise", noise.len() as u64, &mut &noise[..]);
    tar.into_inner().unwrap().finish().unwrap().flush().unwrap();
}

/// `mkfs-accel layer` with no more memory than [`LIMIT`].
fn convert_within_limit(layer: &Path, output: &Path) -> Output {
    Command::new("sh")
        .args(["-c", "ulimit -d \"$0\" && exec \"$@\"", &LIMIT.to_string()])
        .args([env!("CARGO_BIN_EXE_mkfs-accel"), "layer"])
        .args([layer, Path::new("-o"), output])
        // Without memory left to make one of, Rust waits for ever for a backtrace.
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap()
}

/// What the format demands beyond that is said.
#[test]
fn a_zstd_window_that_memory_does_not_reach_for_is_named() {
    let directory = TempDir::new().unwrap();
    let layer = directory.path().join("layer.tar.zst");
    let output = directory.path().join("layer.erofs");
    // A window of 256 MiB, and a block of zeros.
    let frame = b"\x28\xb5\x2f\xfd\0\x90\x03\x40\0\0";
    fs::write(&layer, frame).unwrap();
    let done = convert_within_limit(&layer, &output);
    assert!(!done.status.success(), "{done:?}");
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(
        errors.contains("layer.tar.zst")
            && errors.contains("not enough memory for a frame's window"),
        "{errors}"
    );
    assert!(!output.exists());
}

#[test]
fn memory_does_not_grow_with_the_layer() {
    let directory = TempDir::new().unwrap();
    let layer = directory.path().join("layer.tar.gz");
    let output = directory.path().join("layer.erofs");
    // Several times the limit.
    write_layer(&layer, 256 << 20);
    let done = convert_within_limit(&layer, &output);
    assert!(done.status.success(), "{done:?}");
    assert!(fs::metadata(&output).unwrap().len() > 276 << 20);
}
