//! Compiles the part of the CRI that `cri` speaks, and containerd's snapshots service.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let snapshots = "../src/accel-snapshotter/proto";
    let descriptors = protox::compile(["cri.proto", "snapshots.proto"], ["proto", snapshots])?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(descriptors)?;
    println!("cargo::rerun-if-changed=proto/cri.proto");
    println!("cargo::rerun-if-changed={snapshots}/snapshots.proto");
    Ok(())
}
