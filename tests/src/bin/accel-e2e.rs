//! Runs the end-to-end checks on this kernel; prints like `cargo test`.

use std::path::PathBuf;
use std::process::ExitCode;

use accel_tests::{Setting, checks};
use clap::Parser;
use libtest_mimic::Arguments as Libtest;

/// End-to-end checks of image-accel, as root, on the running kernel
#[derive(Debug, Parser)]
struct Arguments {
    /// Directory of the programs under test
    #[arg(long, value_name = "DIR")]
    bin: PathBuf,
    /// What tests/fixtures made
    #[arg(long, value_name = "DIR")]
    fixtures: PathBuf,
    /// How images are exported
    #[arg(long, value_parser = ["ublk", "fuse", "auto"])]
    transport: String,
    /// Where temporary files go
    #[arg(long, value_name = "DIR", default_value = "/tmp")]
    scratch: PathBuf,
    /// List the checks and run none
    #[arg(long)]
    list: bool,
    /// Only the checks whose name contains one of these
    filter: Vec<String>,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let setting = Setting {
        bin: arguments.bin.canonicalize()?,
        fixtures: arguments.fixtures.canonicalize()?,
        transport: arguments.transport,
        scratch: arguments.scratch.canonicalize()?,
    };
    let trials = checks::all(&setting)?
        .into_iter()
        .filter(|trial| {
            arguments.filter.is_empty()
                || arguments
                    .filter
                    .iter()
                    .any(|part| trial.name().contains(part))
        })
        .collect();
    // One after the other: the checks look at what is left on the whole machine.
    let libtest = Libtest {
        test_threads: Some(1),
        list: arguments.list,
        ..Libtest::default()
    };
    Ok(libtest_mimic::run(&libtest, trials).exit_code())
}
