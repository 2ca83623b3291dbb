//! `upgrade`: has this program, or another, take the daemon's place.

use crate::paths::Paths;
use crate::protocol::{Command, Reply, Status, Upgrading};
use crate::{handover, wire};
use anyhow::{Context, Result, bail};
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long the daemon may look at the new program, and take to end.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often the new daemon is asked.
const PAUSE: Duration = Duration::from_millis(20);

/// Has `program`, this one unless another is given, take the daemon's place; gives
/// what there is to say about it. Readers wait for a moment, and see no error.
pub fn upgrade(paths: &Paths, program: Option<&Path>) -> Result<String> {
    let program = match program {
        Some(program) => program
            .canonicalize()
            .with_context(|| format!("cannot find {}", program.display()))?,
        None => handover::program(),
    };
    let socket = &paths.socket;
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("cannot reach the daemon at {}", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let command = Command::Upgrade {
        program: program.clone(),
    };
    wire::send(&stream, &command, None)?;
    let Upgrading { from, to } = match wire::receive::<Reply<Upgrading>>(&stream)?.0 {
        Reply::Ok(upgrading) => upgrading,
        Reply::Error(error) | Reply::Again(error) => bail!(error),
    };
    let since = Instant::now();
    // It hangs up by ceasing to be.
    if stream.read(&mut [0]).is_ok_and(|read| read > 0) {
        bail!("the daemon at {} talks nonsense", socket.display());
    }
    loop {
        let left = PATIENCE.saturating_sub(since.elapsed());
        match wire::ask_within::<Status>(socket, &Command::Status, left.max(PAUSE)) {
            Ok(status) if status.program == program => {
                return Ok(format!(
                    "{from} was followed by {to} ({}, process {}); {} exports go on\n",
                    program.display(),
                    status.pid,
                    status.exports.len()
                ));
            }
            Ok(status) => bail!(
                "{} did not take over: {} serves; the daemon's log says why",
                program.display(),
                status.program.display()
            ),
            Err(error) if since.elapsed() > PATIENCE => {
                return Err(error).context("the new daemon does not answer; its log says why");
            }
            Err(_) => thread::sleep(PAUSE),
        }
    }
}
