//! The snapshotter and its command line.

use accel_client::paths::{Paths, SOCKET};
use accel_snapshotter::config::{Containerd, Scope};
use accel_snapshotter::{config, serve, service};
use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tracing_subscriber::EnvFilter;

/// Where containerd 1.6 looks for disk figures of a snapshotter called `accel`.
const ROOT: &str = "/var/lib/containerd/io.containerd.snapshotter.v1.accel";
const LISTEN: &str = "/run/accel/snapshotter.sock";

/// Lets containerd start converted images without downloading or unpacking them.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the snapshotter.
    Serve {
        /// Where snapshots are kept.
        #[arg(long, value_name = "DIR", default_value = ROOT)]
        root: PathBuf,
        /// Where containerd asks.
        #[arg(long, value_name = "PATH", default_value = LISTEN)]
        socket: PathBuf,
        /// The admin socket of ublk-server.
        #[arg(long, value_name = "PATH", default_value = SOCKET)]
        server: PathBuf,
        /// Its run directory, if it was told another than the default.
        #[arg(long, value_name = "DIR")]
        server_run_dir: Option<PathBuf>,
        /// Seconds that a pull may spend on finding and mounting layers; what is not
        /// there by then is downloaded and unpacked.
        #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = seconds)]
        budget: f64,
    },
    /// Print what containerd's configuration needs.
    Config {
        /// Its version: 1.6, 1.7 or 2.x.
        #[arg(long, value_name = "VERSION")]
        containerd: Containerd,
        /// For which pods.
        #[arg(long = "for", value_enum, default_value = "default")]
        scope: Scope,
        /// As given to `serve`.
        #[arg(long, value_name = "DIR", default_value = ROOT)]
        root: PathBuf,
        /// As given to `serve`.
        #[arg(long, value_name = "PATH", default_value = LISTEN)]
        socket: PathBuf,
    },
    /// Show which layers are loaded lazily, which are not, and why.
    Status {
        /// The snapshotter's socket.
        #[arg(long, value_name = "PATH", default_value = LISTEN)]
        socket: PathBuf,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
}

fn print(text: &str) -> Result<()> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("cannot print")
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "this is no number".to_owned())?;
    match (0.1..=600.0).contains(&seconds) {
        true => Ok(seconds),
        false => Err("at least 0.1 and at most 600".to_owned()),
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Serve {
            root,
            socket,
            server,
            server_run_dir,
            budget,
        } => serve::run(&serve::Options {
            root,
            socket,
            server: Paths::new(&server, server_run_dir),
            budget: Duration::from_secs_f64(budget),
        }),
        Command::Config {
            containerd,
            scope,
            root,
            socket,
        } => {
            let stanza = config::stanza(containerd, scope, &socket, &root);
            print(&stanza.map_err(anyhow::Error::msg)?)
        }
        Command::Status { socket, json } => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("cannot start")?;
            let status = runtime.block_on(service::ask_status(socket))?;
            match json {
                true => print(&(serde_json::to_string_pretty(&status)? + "\n")),
                false => print(&status.to_string()),
            }
        }
    }
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("accel-snapshotter: {error:#}");
            ExitCode::FAILURE
        }
    }
}
