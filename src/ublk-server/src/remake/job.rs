//! One job: the child process that makes a layer, from its start to its end.

use super::{Recipe, Setup};
use accel_source::privileges::{WRITE, keep_only};
use accel_ufs::names::LayerName;
use anyhow::Result;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The converter's exit code for bytes that are not what they should be.
const DAMAGED: i32 = 3;
/// How often the job is looked at while it says nothing.
const LOOK: Duration = Duration::from_millis(200);
/// How long a child that is to end may take before it is killed.
const GRACE: Duration = Duration::from_secs(5);
/// What the kernel adds to a job's score, in thousandths of the memory, when it looks for
/// a process to end for want of memory.
const EXPENDABLE: &str = "500";
/// How much of what it says is kept, in bytes.
const KEPT: usize = 8 << 10;

/// Why a layer was not made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub reason: String,
    /// What it would be made of is not what it should be.
    pub lasting: bool,
}

impl Failure {
    fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            lasting: false,
        }
    }
}

/// Makes `recipe`'s layer and removes what is not in `keep`; without a recipe only the
/// latter. `progress` is called with the bytes read so far, or without if there is
/// nothing new, and says whether to go on.
pub(super) fn make(
    setup: &Setup,
    recipe: Option<&Recipe>,
    keep: &[String],
    progress: &mut dyn FnMut(Option<u64>) -> bool,
) -> Result<(), Failure> {
    let layer = recipe.map(|recipe| {
        let origin = &recipe.origin;
        json!({
            "source": origin.source,
            "platform": origin.platform,
            "diff_id": origin.diff_id,
            "chain_id": origin.chain_id,
            "chain": matches!(recipe.name, LayerName::Chain(_)),
            "root": recipe.root,
            "size": recipe.size,
        })
    });
    let limit = setup.options.remake_size;
    let job = json!({"limit": limit, "keep": keep, "layer": layer});
    let mut child = start(setup).map_err(|error| {
        let program = setup.program.display();
        Failure::new(format!("cannot start {program}: {error}"))
    })?;
    let result = attend(&mut child, &job.to_string(), setup, progress);
    if result.is_err() {
        end(&mut child);
    }
    let (status, said) = result?;
    if status.success() {
        return Ok(());
    }
    let mut reason = last_line(&said);
    if reason.is_empty() {
        reason = format!("{} ended with {status}", setup.program.display());
    }
    Err(Failure {
        reason,
        lasting: status.code() == Some(DAMAGED),
    })
}

fn start(setup: &Setup) -> io::Result<Child> {
    let options = &setup.options;
    let mut arguments: Vec<OsString> = vec![
        "remake-job".into(),
        "--namespace".into(),
        (&setup.namespace).into(),
        "--".into(),
        setup.program.clone().into(),
        "remake".into(),
        "--into".into(),
        setup.directory.clone().into(),
    ];
    if options.remake_plain_http {
        arguments.push("--plain-http".into());
    }
    if let Some(path) = &options.registry_config {
        arguments.extend(["--registry-config".into(), path.clone().into()]);
    }
    Command::new("/proc/self/exe")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

/// Hears the child until it ends; what it said on standard error is given.
fn attend(
    child: &mut Child,
    job: &str,
    setup: &Setup,
    progress: &mut dyn FnMut(Option<u64>) -> bool,
) -> Result<(ExitStatus, Vec<u8>), Failure> {
    let mut stdin = child.stdin.take();
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    // The child reads it all before it does anything.
    let told = stdin.as_mut().map(|stdin| stdin.write_all(job.as_bytes()));
    drop(stdin);
    if let Some(Err(error)) = told
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        return Err(Failure::new(format!("cannot tell the job: {error}")));
    }
    let stall = setup.options.remake_stall;
    let (mut line, mut said) = (Vec::new(), Vec::new());
    let mut moved = Instant::now();
    let mut last = None;
    let mut buffer = [0; 4096];
    while out.is_some() || err.is_some() {
        let mut news = None;
        for (pipe, text) in [
            (&mut out as &mut dyn Pipe, &mut line),
            (&mut err as &mut dyn Pipe, &mut said),
        ] {
            if pipe.hear(&mut buffer, text) {
                // It says something, but not on standard output: no progress.
                text.drain(..text.len().saturating_sub(KEPT));
            }
        }
        while let Some(end) = line.iter().position(|&byte| byte == b'\n') {
            let text: Vec<_> = line.drain(..=end).collect();
            news = parse(&text).or(news);
        }
        let news = news.filter(|bytes| last != Some(*bytes));
        if news.is_some() {
            (last, moved) = (news, Instant::now());
        }
        if !progress(news) {
            return Err(Failure::new("it is not needed any more"));
        }
        if moved.elapsed() >= stall {
            return Err(Failure::new(format!(
                "it stood still for {} s and was ended (at {} bytes)",
                stall.as_secs(),
                last.unwrap_or(0)
            )));
        }
        wait(&out, &err);
    }
    let status = child.wait();
    let status = status.map_err(|error| Failure::new(format!("it is lost: {error}")))?;
    Ok((status, said))
}

/// One end of a pipe, until the other is closed.
trait Pipe {
    /// Takes in what there is; true if there was something.
    fn hear(&mut self, buffer: &mut [u8], text: &mut Vec<u8>) -> bool;
}

impl<T: Read + AsFd> Pipe for Option<T> {
    fn hear(&mut self, buffer: &mut [u8], text: &mut Vec<u8>) -> bool {
        let Some(pipe) = self else {
            return false;
        };
        let now = Timespec::default();
        let mut polled = [PollFd::new(&*pipe, PollFlags::IN)];
        if !matches!(rustix::event::poll(&mut polled, Some(&now)), Ok(1..)) {
            return false;
        }
        match pipe.read(buffer) {
            Ok(0) | Err(_) => {
                *self = None;
                false
            }
            Ok(len) => {
                text.extend_from_slice(&buffer[..len]);
                true
            }
        }
    }
}

/// Until there is something to hear, or it is time to look.
fn wait(out: &Option<impl AsFd>, err: &Option<impl AsFd>) {
    let mut polled = Vec::new();
    polled.extend(out.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
    polled.extend(err.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
    let time = Timespec::try_from(LOOK).unwrap_or_default();
    let _ = rustix::event::poll(&mut polled, Some(&time));
}

/// `progress BYTES`
fn parse(line: &[u8]) -> Option<u64> {
    let line = std::str::from_utf8(line).ok()?;
    line.trim().strip_prefix("progress ")?.parse().ok()
}

/// What it said last, for people: without the name of the program.
fn last_line(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    let line = line.unwrap_or_default().trim();
    line.strip_prefix("mkfs-accel: ").unwrap_or(line).to_owned()
}

/// Ends a child: kindly, so that it leaves nothing unfinished, then not.
fn end(child: &mut Child) {
    let until = Instant::now() + GRACE;
    let _ = kill_process(Pid::from_child(child), Signal::TERM);
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() >= until {
            let _ = child.kill();
            // One that is stuck in the kernel ends when it can.
            for _ in 0..10 {
                if !matches!(child.try_wait(), Ok(None)) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Becomes `program` in a mount namespace, tied to the daemon's life and without
/// anything that the daemon had open.
///
/// # Errors
/// It cannot; nothing was started.
pub fn run(namespace: &Path, program: &Path, arguments: &[OsString]) -> Result<()> {
    // The daemon is not to be ended when memory is short; this is, before others: it can be
    // begun anew. Before the namespace is another's, where /proc may not be.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", EXPENDABLE) {
        tracing::warn!(%error, "cannot let the job be ended when memory is short");
    }
    accel_source::worker::part_from_daemon(Some(namespace))?;
    // Its directory, UFS and credentials may belong to others.
    keep_only(WRITE)?;
    std::env::set_current_dir("/")?;
    let error = Command::new(program).args(arguments).exec();
    anyhow::bail!("cannot run {}: {error}", program.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_says_is_understood() {
        assert_eq!(parse(b"progress 123\n"), Some(123));
        assert_eq!(parse(b"progress x\n"), None);
        assert_eq!(parse(b"anything"), None);
        assert_eq!(last_line(b"warning\nmkfs-accel: no route\n\n"), "no route");
        assert_eq!(last_line(b""), "");
    }
}
