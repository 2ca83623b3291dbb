//! A daemon of one check's own: started on a socket of its own, asked by its own
//! client, stopped when it goes out of scope, whatever happened.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal, kill_process};

use crate::Setting;

/// Only a bound for a daemon that hangs. Emulation makes everything slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// How one daemon follows another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Succession {
    /// It is killed and another is started.
    Kill,
    /// It is asked to end and another is started.
    Terminate,
    /// Another program takes its place in the same process.
    Upgrade,
}

/// A running `ublk-server serve`.
#[derive(Debug)]
pub struct Daemon {
    program: PathBuf,
    ufs: PathBuf,
    transport: String,
    further: Vec<String>,
    child: Mutex<Child>,
    directory: tempfile::TempDir,
}

impl Daemon {
    /// Starts the daemon on `ufs` and waits until it answers.
    ///
    /// # Errors
    /// When it ends or does not answer; its log is in the error.
    pub fn start(setting: &Setting, ufs: &Path) -> Result<Self> {
        Self::start_program(setting, &setting.ublk_server(), ufs)
    }

    /// The same with another build of it.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn start_program(setting: &Setting, program: &Path, ufs: &Path) -> Result<Self> {
        Self::start_with(setting, program, ufs, &[])
    }

    /// The same with further words of `serve`.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn start_with(
        setting: &Setting,
        program: &Path,
        ufs: &Path,
        further: &[&str],
    ) -> Result<Self> {
        let directory = setting.scratch_dir()?;
        let further: Vec<_> = further.iter().map(|word| (*word).to_owned()).collect();
        let child = spawn(program, ufs, &setting.transport, &further, directory.path())?;
        let daemon = Self {
            program: program.to_owned(),
            ufs: ufs.to_owned(),
            transport: setting.transport.clone(),
            further,
            child: Mutex::new(child),
            directory,
        };
        daemon.await_answer()?;
        Ok(daemon)
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn await_answer(&self) -> Result<()> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child().try_wait()? {
                bail!("the daemon ended at once: {status}\n{}", self.log());
            }
            if self.client(["list"])?.status.success() {
                return Ok(());
            }
            ensure!(
                started.elapsed() < PATIENCE,
                "the daemon does not answer\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Kills it, whatever it is doing, and starts another in its place.
    ///
    /// # Errors
    /// When that does not start.
    pub fn kill_and_restart(&self) -> Result<()> {
        self.succeed(Succession::Kill, || {})
    }

    /// Has another daemon take its place. `event` is called when it is about to end.
    ///
    /// # Errors
    /// When the other does not serve.
    pub fn succeed(&self, how: Succession, event: impl FnOnce()) -> Result<()> {
        event();
        match how {
            Succession::Kill => self.kill()?,
            Succession::Terminate => {
                let status = self.terminate()?;
                ensure!(status.success(), "it ended with {status}\n{}", self.log());
            }
            Succession::Upgrade => return self.ask(["upgrade"]).map(drop),
        }
        self.start_again()
    }

    /// Kills it.
    ///
    /// # Errors
    /// When that fails.
    pub fn kill(&self) -> Result<()> {
        let mut child = self.child();
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Starts another after it ended.
    ///
    /// # Errors
    /// When that does not serve.
    pub fn start_again(&self) -> Result<()> {
        let (ufs, transport, further) = (&self.ufs, &self.transport, &self.further);
        let child = spawn(
            &self.program,
            ufs,
            transport,
            further,
            self.directory.path(),
        )?;
        *self.child() = child;
        self.await_answer()
    }

    /// Kills it as a machine that goes down does: what it left in its run directory
    /// and what is mounted from it there and beneath `root` is gone. For files over
    /// FUSE; block devices stay with the kernel.
    ///
    /// # Errors
    /// When something cannot be undone.
    pub fn kill_and_forget(&self, root: &Path) -> Result<()> {
        let status: serde_json::Value = serde_json::from_str(&self.ask(["status", "--json"])?)?;
        let keeper = status["keeper"].as_i64();
        {
            let mut child = self.child();
            child.kill()?;
            child.wait()?;
        }
        let keeper = keeper.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        if let Some(keeper) = keeper {
            let _ = kill_process(keeper, Signal::KILL);
        }
        let text = fs::read_to_string("/proc/self/mountinfo")?;
        let mut points: Vec<_> = text
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .map(Path::new)
            .filter(|point| point.starts_with(root) || point.starts_with(self.directory.path()))
            .collect();
        points.reverse();
        for point in points {
            rustix::mount::unmount(point, UnmountFlags::DETACH)
                .with_context(|| format!("unmounting {}", point.display()))?;
        }
        let run = self.directory.path().join("socket.d");
        fs::remove_dir_all(&run).with_context(|| format!("removing {}", run.display()))
    }

    /// Whether layers are files over FUSE.
    pub fn is_fuse(&self) -> bool {
        self.transport == "fuse"
    }

    /// Stops it and everything that it has started, until [`Daemon::resume`].
    ///
    /// # Errors
    /// When that is not possible.
    pub fn stop_moving(&self) -> Result<()> {
        self.signal_all(Signal::STOP)
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn resume(&self) -> Result<()> {
        self.signal_all(Signal::CONT)
    }

    fn signal_all(&self, signal: Signal) -> Result<()> {
        let mut waiting = vec![Pid::from_child(&self.child())];
        while let Some(pid) = waiting.pop() {
            kill_process(pid, signal)?;
            let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
            for task in fs::read_dir(&tasks)?.flatten() {
                let children = fs::read_to_string(task.path().join("children"))?;
                let children = children.split_whitespace().flat_map(str::parse);
                waiting.extend(children.filter_map(Pid::from_raw));
            }
        }
        Ok(())
    }

    /// Whether it has ended by itself, or was ended by somebody else.
    ///
    /// # Errors
    /// When that cannot be seen.
    pub fn has_ended(&self) -> Result<bool> {
        Ok(self.child().try_wait()?.is_some())
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child().id()
    }

    /// Its admin socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// Its run directory.
    pub fn run(&self) -> PathBuf {
        self.directory.path().join("socket.d")
    }

    /// All that it and those before it logged.
    ///
    /// # Errors
    /// When its log cannot be read.
    pub fn whole_log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.directory.path().join("log"))?)
    }

    /// The end of what it logged.
    pub fn log(&self) -> String {
        let text = self.whole_log().unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let shown = &lines[lines.len().saturating_sub(8)..];
        format!("--- the daemon's log ---\n{}\n---", shown.join("\n"))
    }

    /// Whether it has logged this.
    ///
    /// # Errors
    /// When its log cannot be read.
    pub fn has_said(&self, what: &str) -> Result<bool> {
        Ok(self.whole_log()?.contains(what))
    }

    /// Runs a client command against it: the subcommand first, then its arguments.
    ///
    /// # Errors
    /// When it cannot be run at all.
    pub fn client<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<Output> {
        let mut words = words.into_iter();
        let mut command = Command::new(&self.program);
        command
            .args(words.next())
            .arg("--socket")
            .arg(self.socket())
            .args(words)
            .stdin(Stdio::null());
        command
            .output()
            .with_context(|| format!("running {command:?}"))
    }

    /// The same for a command that has to succeed; its standard output.
    ///
    /// # Errors
    /// When it fails; with what it said and the daemon's log.
    pub fn ask<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<String> {
        let words: Vec<S> = words.into_iter().collect();
        let output = self.client(words.iter().map(AsRef::as_ref))?;
        ensure!(
            output.status.success(),
            "ublk-server {} failed ({}): {}\n{}",
            words
                .iter()
                .map(|word| word.as_ref().to_string_lossy())
                .collect::<Vec<_>>()
                .join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end(),
            self.log()
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Exports the image's layers; the devices or files that they are, lowest first.
    ///
    /// # Errors
    /// When that fails, or says nothing that exists.
    pub fn attach(&self, image: &str) -> Result<Vec<PathBuf>> {
        let said = self.ask(["attach", image])?;
        let paths: Vec<PathBuf> = said.lines().map(PathBuf::from).collect();
        for path in &paths {
            ensure!(
                path.exists(),
                "attach printed {said:?}; {} is not there",
                path.display()
            );
        }
        Ok(paths)
    }

    /// Takes the exports away again.
    ///
    /// # Errors
    /// When that fails.
    pub fn detach(&self, image: &str) -> Result<()> {
        self.ask(["detach", image]).map(drop)
    }

    /// Mounts an image on a new directory.
    ///
    /// # Errors
    /// When that fails.
    pub fn mount(&self, image: &str) -> Result<Mounted<'_>> {
        self.mount_with(image, &[])
    }

    /// Mounts an image with further arguments, e.g. `--rw UPPER`.
    ///
    /// # Errors
    /// When that fails.
    pub fn mount_with(&self, image: &str, further: &[&OsStr]) -> Result<Mounted<'_>> {
        let directory = tempfile::Builder::new()
            .prefix("mnt.")
            .tempdir_in(self.directory.path())?;
        let mut words = vec![
            OsStr::new("mount"),
            OsStr::new(image),
            directory.path().as_os_str(),
        ];
        words.extend(further);
        self.ask(words)?;
        Ok(Mounted {
            daemon: self,
            directory: Some(directory),
        })
    }

    /// Asks it to end and waits.
    ///
    /// # Errors
    /// When it does not, or not with success.
    pub fn stop(self) -> Result<()> {
        let status = self.terminate()?;
        ensure!(
            status.success(),
            "the daemon ended with {status}\n{}",
            self.log()
        );
        Ok(())
    }

    fn terminate(&self) -> Result<std::process::ExitStatus> {
        let mut child = self.child();
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        kill_process(Pid::from_child(&child), Signal::TERM)?;
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        child.kill()?;
        bail!(
            "the daemon did not end in {PATIENCE:?} and was killed\n{}",
            self.log()
        )
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.terminate() {
            eprintln!("{error:#}");
        }
    }
}

fn spawn(
    program: &Path,
    ufs: &Path,
    transport: &str,
    further: &[String],
    directory: &Path,
) -> Result<Child> {
    let log = File::options()
        .create(true)
        .append(true)
        .open(directory.join("log"))?;
    Command::new(program)
        .arg("serve")
        .arg("--ufs")
        .arg(ufs)
        .arg("--socket")
        .arg(directory.join("socket"))
        .args(["--cache-size", "256M", "--transport", transport])
        .args(further)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {}", program.display()))
}

/// One request to the daemon at this socket, past the client program.
///
/// # Errors
/// When it does not answer, or refuses.
pub fn ask(socket: &Path, request: &serde_json::Value) -> Result<serde_json::Value> {
    let mut stream = UnixStream::connect(socket)?;
    writeln!(stream, "{request}")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let answer: serde_json::Value = serde_json::from_str(&text)?;
    let ok = answer
        .get("ok")
        .with_context(|| format!("{request}: {text}"))?;
    Ok(ok.clone())
}

/// A mounted image.
#[derive(Debug)]
pub struct Mounted<'a> {
    daemon: &'a Daemon,
    /// Taken when it has been unmounted.
    directory: Option<tempfile::TempDir>,
}

impl Mounted<'_> {
    /// Where.
    pub fn path(&self) -> &Path {
        self.directory
            .as_ref()
            .map_or(Path::new("/nowhere"), tempfile::TempDir::path)
    }

    /// Runs a command for `/bin/sh` in it and gives its standard output.
    ///
    /// # Errors
    /// When the command fails.
    pub fn run(&self, program: &str) -> Result<String> {
        run_in(self.path(), program).with_context(|| self.daemon.log())
    }

    /// Unmounts it.
    ///
    /// # Errors
    /// When that fails, or leaves something in the directory.
    pub fn unmount(mut self) -> Result<()> {
        let Some(directory) = self.directory.take() else {
            return Ok(());
        };
        let path = directory.keep();
        let result = self.take_down(&path);
        if result.is_ok() {
            fs::remove_dir(&path).context("removing the mount point after unmounting")?;
        } else {
            self.insist(&path);
        }
        result
    }

    fn take_down(&self, path: &Path) -> Result<()> {
        self.daemon
            .ask([OsStr::new("unmount"), path.as_os_str()])
            .map(drop)
    }

    /// For checks that failed and may still have files open.
    fn insist(&self, path: &Path) {
        let _ = Command::new("umount").arg("--lazy").arg(path).status();
        if let Err(error) = self.take_down(path) {
            eprintln!("{error:#}");
        }
        // Fails while something is mounted there, and then it has to stay.
        let _ = fs::remove_dir(path);
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let Some(directory) = self.directory.take() else {
            return;
        };
        let path = directory.keep();
        match self.take_down(&path) {
            Ok(()) => drop(fs::remove_dir(path)),
            Err(error) => {
                eprintln!("{error:#}");
                self.insist(&path);
            }
        }
    }
}

/// Runs a command for `/bin/sh` with `root` as its root and gives its standard output.
///
/// # Errors
/// When it fails; with what it said.
pub fn run_in(root: &Path, program: &str) -> Result<String> {
    let output = Command::new("chroot")
        .arg(root)
        .args(["/bin/sh", "-c", program])
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
        .stdin(Stdio::null())
        .output()
        .context("running chroot")?;
    ensure!(
        output.status.success(),
        "{program} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(String::from_utf8(output.stdout)?)
}
