//! `tree-manifest DIR`: the tree below DIR as text, one line per entry.

use std::io::{BufWriter, Write as _};
use std::path::PathBuf;

use clap::Parser;

/// Writes a directory tree as text, one line per entry with a digest of its content
#[derive(Debug, Parser)]
struct Arguments {
    /// The tree's root
    dir: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut out = BufWriter::new(std::io::stdout().lock());
    accel_tests::tree::write_manifest(&arguments.dir, &mut out)?;
    out.flush()?;
    Ok(())
}
