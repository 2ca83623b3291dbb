//! The converter's command line: parse, run, report, exit code.

mod commands;
mod exit;
mod interrupt;
mod jobs;
mod layers;
mod output;
mod progress;
mod published;
mod registry;
mod sink;
mod storage;
mod tree;

use clap::Parser;
use output::complain;
use std::process::ExitCode;

fn main() -> ExitCode {
    let command = commands::Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| progress::Stderr)
        // Or a line that cannot be written there is a panic.
        .log_internal_errors(false)
        .init();
    let result = interrupt::watch().and_then(|()| command.run());
    // A signal ends the process on its own thread; what it tore on this one is
    // of no interest.
    interrupt::wait_if_interrupted();
    match result {
        Ok(commands::Verdict::Good) => ExitCode::from(exit::DONE),
        Ok(commands::Verdict::Damaged) => ExitCode::from(exit::DAMAGED),
        Err(error) if output::is_closed_pipe(&error) => ExitCode::from(exit::DONE),
        Err(error) => {
            complain!("{error:#}");
            ExitCode::from(exit::code(&error))
        }
    }
}
