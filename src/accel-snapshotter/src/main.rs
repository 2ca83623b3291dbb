//! The snapshotter and its command line.

use accel_client::output::print;
use accel_client::paths::{Paths, SOCKET};
use accel_snapshotter::config::{Containerd, Scope, Wanted};
use accel_snapshotter::doctor::look::{Options, look, read};
use accel_snapshotter::doctor::{Finding, Level, Step, containerd};
use accel_snapshotter::settings::{LISTEN, ROOT, Settings};
use accel_snapshotter::{agent, config, edit, idmap, serve, service};
use anyhow::{Context, Result};
use clap::{CommandFactory as _, Parser, Subcommand};
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

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
        #[command(flatten)]
        settings: Settings,
        /// A TOML file with the options above
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Print what containerd's configuration needs.
    Config {
        /// Its version: 1.6, 1.7 or 2.x (taken as 2.1 or later, which differ from 2.0).
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
        /// Let the CRI of containerd 2.1 and later pull images itself, not through the
        /// transfer service, which knows only `config_path` and headers of the
        /// registries' settings.
        #[arg(long)]
        local_pull: bool,
        /// Change this main configuration file of containerd, and what it imports, instead
        /// of printing; what was there is kept beside it, with `.before-accel` at the end.
        #[arg(long, value_name = "FILE")]
        into: Option<PathBuf>,
    },
    /// Look for what is wrong with this node, and say how to mend it. Ends with 0 if
    /// there is nothing, 1 after an error, 3 if there are warnings, 4 if there are faults.
    Doctor {
        /// The snapshotter's socket.
        #[arg(long, value_name = "PATH", default_value = LISTEN)]
        socket: PathBuf,
        /// Its root directory, if it does not run.
        #[arg(long, value_name = "DIR", default_value = ROOT)]
        root: PathBuf,
        /// The admin socket of ublk-server.
        #[arg(long, value_name = "PATH", default_value = SOCKET)]
        server: PathBuf,
        /// containerd's socket.
        #[arg(
            long,
            value_name = "PATH",
            default_value = "/run/containerd/containerd.sock"
        )]
        containerd_socket: PathBuf,
        /// containerd's main configuration file.
        #[arg(
            long,
            value_name = "FILE",
            default_value = "/etc/containerd/config.toml"
        )]
        containerd_config: PathBuf,
        /// containerd's version, if it does not run.
        #[arg(long, value_name = "VERSION")]
        containerd: Option<Containerd>,
        /// For which pods this snapshotter is to be; otherwise it follows from the
        /// configuration.
        #[arg(long = "for", value_enum)]
        scope: Option<Scope>,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Say on UFS which layers this node uses, all the time, so that they are not deleted.
    Agent(agent::Options),
    /// Show which layers are loaded lazily, which are not, and why.
    Status {
        /// The snapshotter's socket.
        #[arg(long, value_name = "PATH", default_value = LISTEN)]
        socket: PathBuf,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Write the manual pages of this program and its commands into a directory.
    Man {
        /// The directory; it must exist.
        directory: PathBuf,
    },
}

/// Changes containerd's configuration as a doctor would, and says how.
fn change(main: &Path, wanted: &Wanted<'_>) -> Result<()> {
    let wrong = |finding: Finding| anyhow::Error::msg(finding.what);
    let configuration = read(main).map_err(wrong)?;
    let findings = containerd::examine(&configuration, wanted);
    let steps: Vec<_> = findings
        .into_iter()
        .flat_map(|finding| finding.mend)
        .filter(|step| matches!(step, Step::Set { .. } | Step::Remove { .. }))
        .collect();
    edit::apply(&steps)?;
    let text: String = steps.iter().map(|step| format!("{step}\n")).collect();
    match steps.is_empty() {
        true => print("nothing to change\n"),
        false => print(text + "now restart containerd\n"),
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> Result<T> {
    Ok(service::runtime()?.block_on(work))
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Serve { settings, config } => {
            let file = config.map(|path| Settings::read(&path)).transpose()?;
            serve::run(&settings.or(file.unwrap_or_default()).options())
        }
        Command::Agent(options) => agent::run(&options),
        Command::Config {
            containerd,
            scope,
            root,
            socket,
            local_pull,
            into,
        } => {
            let wanted = Wanted {
                version: containerd,
                scope,
                socket: &socket,
                root: &root,
                local_pull,
                maps_ids: idmap::supported(&idmap::release()),
            };
            let stanza = config::stanza(&wanted).map_err(anyhow::Error::msg)?;
            match into {
                None => print(stanza),
                Some(main) => change(&main, &wanted),
            }
        }
        Command::Doctor {
            socket,
            root,
            server,
            containerd_socket,
            containerd_config,
            containerd,
            scope,
            json,
        } => {
            let report = block_on(look(&Options {
                socket,
                root,
                server: Paths::new(&server, None),
                containerd: containerd_socket,
                configuration: containerd_config,
                version: containerd,
                scope,
            }))?;
            match json {
                true => print(serde_json::to_string_pretty(&report)? + "\n"),
                false => print(&report),
            }?;
            return Ok(match report.worst() {
                Level::Ok => ExitCode::SUCCESS,
                Level::Warning => ExitCode::from(3),
                Level::Fault => ExitCode::from(4),
            });
        }
        Command::Man { directory } => clap_mangen::generate_to(Cli::command(), &directory)
            .with_context(|| format!("cannot write manual pages into {directory:?}")),
        Command::Status { socket, json } => {
            let status = block_on(service::ask_status(socket, service::PATIENCE))??;
            match json {
                true => print(serde_json::to_string_pretty(&status)? + "\n"),
                false => print(&status),
            }
        }
    }
    .map(|()| ExitCode::SUCCESS)
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        // Or a line that cannot be written there is a panic.
        .log_internal_errors(false)
        .init();
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "accel-snapshotter: {error:#}");
            ExitCode::FAILURE
        }
    }
}
