//! The node daemon and its client commands.

use accel_client::output::print;
use accel_source::{disk_worker, worker};
use accel_transport::Wanted;
use anyhow::{Context as _, Result};
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use ublk_server::disk_cache::DiskCacheOptions;
use ublk_server::log::LogFormat;
use ublk_server::paths::{Paths, SOCKET};
use ublk_server::remake::{self, RemakeOptions};
use ublk_server::{client, keeper, log, rescue, serve, size, time};

/// Serves converted images on this node: on demand, verified, as block devices.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    /// How the log is written to standard error; RUST_LOG says how much of it.
    #[arg(long, value_name = "text|json", default_value = "text", global = true)]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Place {
    /// The daemon's admin socket.
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
    /// Where daemon and clients keep locks, journal and mount points. The
    /// default follows from the socket.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // there is one of them
enum Command {
    /// Run the daemon.
    Serve {
        /// Directory with converted images, usually on a shared file system.
        #[arg(long, value_name = "DIR")]
        ufs: PathBuf,
        /// Another directory with the same files, asked when UFS fails; may be
        /// given several times.
        #[arg(long = "replica", value_name = "DIR")]
        replicas: Vec<PathBuf>,
        /// How long one of them may take to answer before the next is asked, such
        /// as 500ms or 5s.
        #[arg(long, value_name = "TIME", default_value = "5s", value_parser = time::parse)]
        attempt_timeout: Duration,
        /// How long a read of a container waits when none answers before it fails,
        /// such as 10m; 0: for ever.
        #[arg(long, value_name = "TIME", default_value = "10m", value_parser = time::parse)]
        request_timeout: Duration,
        /// Memory for verified chunks, such as 256M or 2G; at least 16M.
        #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = size::parse)]
        cache_size: u64,
        /// Leave that memory in ordinary pages. Otherwise the kernel (6.1 or newer) is asked
        /// to put together huge pages of what is in use of it, 2 MiB each, which takes no
        /// more memory and serves faster.
        #[arg(long)]
        no_huge_pages: bool,
        #[command(flatten)]
        disk_cache: DiskCacheOptions,
        #[command(flatten)]
        remake: RemakeOptions,
        /// How layers reach the kernel.
        #[arg(long, value_name = "auto|ublk|fuse", default_value = "auto")]
        transport: Wanted,
        /// How long a thread that serves block devices looks for the next request before
        /// it sleeps, in microseconds, at most; it does so while requests follow each
        /// other closely, on at most half of the processors at once. 0: never. FUSE has
        /// none of this.
        #[arg(long, value_name = "N", default_value = "200", value_parser = clap::value_parser!(u64).range(0..=1000))]
        poll_us: u64,
        /// Where to answer Prometheus over HTTP (`/metrics`), such as
        /// 127.0.0.1:9599; not at all unless given. Whoever reaches it may read it.
        #[arg(long, value_name = "ADDR:PORT")]
        metrics: Option<SocketAddr>,
        /// Block devices end with the daemon: for the test that has to notice.
        #[arg(long, hide = true)]
        without_recovery: bool,
        /// What the program before left, in an upgrade.
        #[arg(long, hide = true, value_name = "FILES")]
        inherited: Option<String>,
        /// Only look whether options and journal are understood.
        #[arg(long, hide = true)]
        check: bool,
        #[command(flatten)]
        place: Place,
    },
    /// Put this program in the daemon's place; who reads waits a moment.
    Upgrade {
        /// Another program instead of this one.
        #[arg(long, value_name = "PATH")]
        program: Option<PathBuf>,
        #[command(flatten)]
        place: Place,
    },
    /// Unmount and detach everything that nobody uses, and end the daemon if nothing
    /// is left. What is in use goes on being served; who uses it is named.
    Shutdown {
        /// The daemon goes on.
        #[arg(long)]
        leave_daemon: bool,
        #[command(flatten)]
        place: Place,
    },
    /// Remove what killed daemons and clients left: devices that no journal knows,
    /// mounts without devices. Nothing in use is touched.
    Gc {
        #[command(flatten)]
        place: Place,
    },
    /// Have readers of devices that no daemon serves get an error instead of waiting
    /// for ever.
    Rescue {
        /// How long to wait for a daemon first, such as 60s.
        #[arg(long, value_name = "TIME", default_value = "0s", value_parser = time::parse)]
        after: Duration,
        #[command(flatten)]
        place: Place,
    },
    /// Export an image's layers without mounting them; prints their devices.
    Attach {
        /// The SOURCE that was converted, or a digest: of a manifest, or of a
        /// single layer (diffID).
        image: String,
        #[command(flatten)]
        place: Place,
    },
    /// End what `attach` began.
    Detach {
        /// As given to `attach`.
        image: String,
        #[command(flatten)]
        place: Place,
    },
    /// Show which images are held, and by whom.
    List {
        #[command(flatten)]
        place: Place,
    },
    /// Show what the daemon serves, and how.
    Status {
        /// For programs.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        place: Place,
    },
    /// Print the daemon's metrics, as Prometheus reads them.
    Metrics {
        #[command(flatten)]
        place: Place,
    },
    /// Mount an image.
    Mount {
        /// The SOURCE that was converted, or the digest of its manifest or index.
        image: String,
        /// Where; the directory must exist.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Make the mount writable; changes go beneath this directory, which
        /// must not be on an overlay itself.
        #[arg(long, value_name = "UPPER")]
        rw: Option<PathBuf>,
        #[command(flatten)]
        place: Place,
    },
    /// Unmount an image.
    Unmount {
        /// Where it is mounted.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        #[command(flatten)]
        place: Place,
    },
    /// Write the manual pages of this program and its commands into a directory.
    Man {
        /// The directory; it must exist.
        directory: PathBuf,
    },
    /// Keeps connections of the daemon, which starts it, beyond its end.
    #[command(hide = true)]
    KeepConnections {
        /// Where its socket lies; it comes as standard input.
        socket: PathBuf,
    },
    /// Writes the disk cache of the daemon, which starts it.
    #[command(hide = true)]
    DiskCacheWorker {
        /// The cache's directory.
        directory: PathBuf,
        /// The mount namespace that it is in.
        #[arg(long)]
        namespace: Option<PathBuf>,
        /// How many slots it has.
        #[arg(long)]
        slots: usize,
    },
    /// Makes a layer for the daemon, which starts it: becomes this program.
    #[command(hide = true)]
    RemakeJob {
        /// The mount namespace to work in.
        #[arg(long)]
        namespace: PathBuf,
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        program: Vec<std::ffi::OsString>,
    },
    /// Reads files for the daemon, which starts it.
    #[command(hide = true)]
    SourceWorker {
        /// The source's directory.
        directory: PathBuf,
        /// The mount namespace that it is in.
        #[arg(long)]
        namespace: Option<PathBuf>,
    },
}

impl From<Place> for Paths {
    fn from(place: Place) -> Self {
        Self::new(&place.socket, place.run_dir)
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Serve {
            ufs,
            replicas,
            attempt_timeout,
            request_timeout,
            cache_size,
            no_huge_pages,
            disk_cache,
            remake,
            transport,
            poll_us,
            metrics,
            without_recovery,
            inherited,
            check,
            place,
        } => serve::run(&serve::Options {
            ufs,
            replicas,
            attempt_timeout,
            request_timeout,
            cache_size,
            huge_pages: !no_huge_pages,
            disk_cache,
            remake,
            transport,
            poll: Duration::from_micros(poll_us),
            metrics,
            recovery: !without_recovery,
            paths: place.into(),
            inherited,
            check,
        })?,
        Command::Upgrade { program, place } => {
            print(client::upgrade(&place.into(), program.as_deref())?)?;
        }
        Command::Shutdown {
            leave_daemon,
            place,
        } => client::shutdown(&place.into(), leave_daemon)?,
        Command::Gc { place } => print(client::gc(&place.into())?)?,
        Command::Rescue { after, place } => print(rescue::run(&place.into(), after)?)?,
        Command::Attach { image, place } => {
            for device in client::attach(&place.into(), &image)? {
                print(format_args!("{}\n", device.display()))?;
            }
        }
        Command::Detach { image, place } => client::detach(&place.into(), &image)?,
        Command::List { place } => print(client::list(&place.into())?)?,
        Command::Status { json, place } => print(client::status(&place.into(), json)?)?,
        Command::Metrics { place } => print(client::metrics(&place.into())?)?,
        Command::Mount {
            image,
            directory,
            rw,
            place,
        } => client::mount(&place.into(), &image, &directory, rw.as_deref())?,
        Command::Unmount { directory, place } => client::unmount(&place.into(), &directory)?,
        Command::Man { directory } => clap_mangen::generate_to(Cli::command(), &directory)
            .with_context(|| format!("cannot write manual pages into {directory:?}"))?,
        Command::KeepConnections { socket } => keeper::process::run(&socket)?,
        Command::DiskCacheWorker {
            directory,
            namespace,
            slots,
        } => disk_worker::run(&directory, slots, namespace.as_deref())?,
        Command::RemakeJob { namespace, program } => {
            if let [program, arguments @ ..] = &program[..] {
                remake::run_job(&namespace, program.as_ref(), arguments)?;
            }
        }
        Command::SourceWorker {
            directory,
            namespace,
        } => worker::run(&directory, namespace.as_deref())?,
    }
    Ok(())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    log::start(cli.log_format);
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "ublk-server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is promised to who sets nothing: five seconds for a source, ten minutes for a read.
    #[test]
    fn deadlines_are_five_seconds_and_ten_minutes() {
        let cli = Cli::try_parse_from(["ublk-server", "serve", "--ufs", "/ufs"]).unwrap();
        let Command::Serve {
            attempt_timeout,
            request_timeout,
            ..
        } = cli.command
        else {
            panic!("{:?} is not what was asked for", cli.command);
        };
        assert_eq!(attempt_timeout, Duration::from_secs(5));
        assert_eq!(request_timeout, Duration::from_mins(10));
    }
}
