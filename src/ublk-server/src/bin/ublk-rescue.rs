//! `ublk-server rescue` as a program of its own: when restarts of the daemon keep
//! failing, its program may be the reason.

use accel_client::output::print;
use clap::Parser;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use ublk_server::paths::{Paths, SOCKET};
use ublk_server::{rescue, time};

/// Has readers of devices that no daemon serves get an error instead of waiting for ever.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    /// How long to wait for a daemon first, such as 60s.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = time::parse)]
    after: Duration,
    /// The daemon's admin socket.
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
    /// As given to the daemon.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(std::io::stderr)
        // Or a line that cannot be written there is a panic.
        .log_internal_errors(false)
        .init();
    let cli = Cli::parse();
    let done = rescue::run(&Paths::new(&cli.socket, cli.run_dir), cli.after);
    match done.and_then(print) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "ublk-rescue: {error:#}");
            ExitCode::FAILURE
        }
    }
}
