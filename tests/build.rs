//! Compiles the part of the CRI that `cri` speaks.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let descriptors = protox::compile(["proto/cri.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(descriptors)?;
    println!("cargo::rerun-if-changed=proto/cri.proto");
    Ok(())
}
