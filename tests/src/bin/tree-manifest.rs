//! `tree-manifest DIR`: the tree below DIR as text, one line per entry.

use std::io::{BufWriter, Write as _};
use std::path::PathBuf;

use accel_tests::tree::{Options, write_manifest};
use clap::Parser;

/// Writes a directory tree as text, one line per entry with a digest of its content
#[derive(Debug, Parser)]
struct Arguments {
    /// The tree's root
    dir: PathBuf,
    /// Directories changed since then were made by the unpack itself: any time matches
    #[arg(long, value_name = "SECONDS")]
    own_since: Option<i64>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let options = Options {
        own_since: arguments.own_since,
    };
    let mut out = BufWriter::new(std::io::stdout().lock());
    write_manifest(&arguments.dir, options, &mut out)?;
    out.flush()?;
    Ok(())
}
