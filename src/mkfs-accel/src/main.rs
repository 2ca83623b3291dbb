//! The converter's command line: parse, run, report, exit code.

mod commands;
mod interrupt;
mod jobs;
mod layers;
mod output;
mod progress;
mod published;
mod sink;

use clap::Parser;
use std::process::ExitCode;

/// Everything went well.
const DONE: u8 = 0;
/// Something failed; stderr says what.
const FAILED: u8 = 1;
/// `verify` found damage.
const DAMAGED: u8 = 3;

fn main() -> ExitCode {
    let command = commands::Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let result = interrupt::watch().and_then(|()| command.run());
    // A signal ends the process on its own thread; what it tore on this one is
    // of no interest.
    interrupt::wait_if_interrupted();
    match result {
        Ok(commands::Verdict::Good) => ExitCode::from(DONE),
        Ok(commands::Verdict::Damaged) => ExitCode::from(DAMAGED),
        Err(error) if output::is_closed_pipe(&error) => ExitCode::from(DONE),
        Err(error) => {
            eprintln!("mkfs-accel: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}
