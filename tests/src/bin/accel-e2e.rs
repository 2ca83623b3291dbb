//! Runs the end-to-end checks on this kernel; prints like `cargo test`. Ends with 77 if
//! all that are named are for the other transport.

use std::path::PathBuf;
use std::process::ExitCode;

use accel_tests::{Setting, checks};
use clap::Parser;
use libtest_mimic::{Arguments as Libtest, Trial};

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
    /// Not the checks whose name contains this; may be repeated
    #[arg(long, value_name = "NAME")]
    skip: Vec<String>,
    /// Only the checks whose name contains one of these
    filter: Vec<String>,
}

/// The exit status for tools/test that says that nothing was tested.
const SKIPPED: u8 = 77;

/// How many of the checks that took longest are named.
const LONGEST: usize = 12;

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let setting = Setting {
        bin: arguments.bin.canonicalize()?,
        fixtures: arguments.fixtures.canonicalize()?,
        transport: arguments.transport,
        scratch: arguments.scratch.canonicalize()?,
    };
    let named = |trial: &Trial| {
        let has = |part: &String| trial.name().contains(part);
        let wanted = arguments.filter.is_empty() || arguments.filter.iter().any(has);
        wanted && !arguments.skip.iter().any(has)
    };
    let mut trials = checks::all(&setting)?;
    trials.retain(named);
    if trials.is_empty() {
        let filter = arguments.filter.join(" ");
        let transport = "ublk".to_owned();
        let all = checks::all(&Setting {
            transport,
            ..setting.clone()
        })?;
        anyhow::ensure!(
            all.iter().any(named),
            "no check's name contains any of: {filter}"
        );
        println!("checks of ublk, not of {}: {filter}", setting.transport);
        return Ok(ExitCode::from(SKIPPED));
    }
    // One after the other: the checks look at what is left on the whole machine.
    let libtest = Libtest {
        test_threads: Some(1),
        list: arguments.list,
        ..Libtest::default()
    };
    let conclusion = libtest_mimic::run(&libtest, trials);
    for (taken, name) in checks::longest(LONGEST) {
        println!("{:6.1} s {name}", taken.as_secs_f64());
    }
    Ok(conclusion.exit_code())
}
