//! A real NFS server and the kernel's client for it, on one machine.
//!
//! The server (knfsd, NFS 4.2) lives in a network namespace of its own; client and
//! server talk TCP over a pair of virtual cables, which can be cut. So a stopped server,
//! a lost packet and a remount look to the client as they do between two machines. What
//! one kernel for both cannot show is a client that runs out of memory while its server
//! needs some: what is written here is a few megabytes.
//!
//! `NFS_LOCALIO`, which lets a client get round a server on its own machine, is
//! switched off.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

const NAMESPACE: &str = "accel-nfs";
const CABLE: &str = "accel-nfs0";
const SERVER: &str = "198.18.7.2";
const CLIENT: &str = "198.18.7.1";
const THREADS: &str = "8";
const PATIENCE: Duration = Duration::from_secs(120);

/// How a client waits for a server that does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// For ever: the default.
    Hard,
    /// For about three minutes, and then it gives an error.
    Soft,
}

/// A running server that exports one directory.
#[derive(Debug)]
pub struct Server {
    exported: PathBuf,
    daemons: Vec<Child>,
    mounts: Vec<PathBuf>,
    own_directories: Vec<PathBuf>,
}

/// Whether this machine can run it: root, both modules, the programs, and it exports nothing
/// itself, which would end with ours.
pub fn is_possible() -> bool {
    let exports = fs::read_to_string("/var/lib/nfs/etab").unwrap_or_default();
    if !exports.trim().is_empty() {
        return false;
    }
    let loaded = |module: &str| {
        Path::new("/sys/module").join(module).exists()
            || Command::new("modprobe")
                .args(["-q", module])
                .status()
                .is_ok_and(|status| status.success())
    };
    [
        "rpc.nfsd",
        "rpc.mountd",
        "nfsdcld",
        "exportfs",
        "mount.nfs4",
    ]
    .iter()
    .all(|name| {
        ["/usr/sbin", "/sbin"]
            .iter()
            .any(|bin| Path::new(bin).join(name).exists())
    }) && ["nfsd", "nfsv4", "veth"].into_iter().all(loaded)
}

impl Server {
    /// Starts it for `exported`. Its clients' root is root there.
    ///
    /// # Errors
    /// When a step fails; what was done is undone.
    pub fn start(exported: &Path) -> Result<Self> {
        Self::start_with(exported, "no_root_squash")
    }

    /// The same, but its clients' root is nobody there, as it is by default.
    ///
    /// # Errors
    /// When a step fails; what was done is undone.
    pub fn start_squashing(exported: &Path) -> Result<Self> {
        Self::start_with(exported, "root_squash")
    }

    fn start_with(exported: &Path, root: &str) -> Result<Self> {
        let mut server = Self {
            exported: exported.to_owned(),
            daemons: Vec::new(),
            mounts: Vec::new(),
            own_directories: Vec::new(),
        };
        for parameter in ["nfs", "nfs_localio"] {
            // Only kernels that have it have the file.
            let _ = fs::write(
                format!("/sys/module/{parameter}/parameters/localio_enabled"),
                "N",
            );
        }
        run(&["ip", "netns", "add", NAMESPACE])?;
        run(&[
            "ip", "link", "add", CABLE, "type", "veth", "peer", "name", "eth0", "netns", NAMESPACE,
        ])?;
        run(&["ip", "addr", "add", &format!("{CLIENT}/30"), "dev", CABLE])?;
        run(&["ip", "link", "set", CABLE, "up"])?;
        let address = format!("{SERVER}/30");
        server.inside(&["ip", "addr", "add", &address, "dev", "eth0"])?;
        server.inside(&["ip", "link", "set", "eth0", "up"])?;
        server.inside(&["ip", "link", "set", "lo", "up"])?;
        // Which server a mounted control file system belongs to is decided by the
        // namespace of whoever mounts it. Here nobody else uses them.
        for (kind, point) in [("rpc_pipefs", "/run/rpc_pipefs"), ("nfsd", "/proc/fs/nfsd")] {
            let _ = fs::create_dir_all(point);
            server.inside(&["mount", "-t", kind, kind, point])?;
            server.mounts.push(point.into());
        }
        for directory in ["/var/lib/nfs/nfsdcld", "/var/lib/nfs/v4recovery"] {
            if !Path::new(directory).exists() {
                fs::create_dir_all(directory)?;
                server.own_directories.push(directory.into());
            }
        }
        // Remembers clients, so that a restarted server lets them go on at once.
        server.daemon(&["nfsdcld", "-F", "-p", "/run/rpc_pipefs"])?;
        server.daemon(&["rpc.mountd", "-F", "-N", "3"])?;
        let exported = format!("{CLIENT}:{}", exported.display());
        let options = format!("rw,{root},no_subtree_check,sync,fsid=7");
        server.inside(&["exportfs", "-i", "-o", &options, &exported])?;
        server.up()?;
        Ok(server)
    }

    /// Starts its threads: it answers again.
    ///
    /// # Errors
    /// When they do not start.
    pub fn up(&self) -> Result<()> {
        self.inside(&["rpc.nfsd", "-N", "3", "-U", THREADS])
    }

    /// Stops it, as `systemctl stop nfs-server` does; its clients' connections end.
    ///
    /// # Errors
    /// When it does not stop.
    pub fn down(&self) -> Result<()> {
        self.inside(&["rpc.nfsd", "0"])
    }

    /// Cuts the cable: nothing is answered, and nothing refused.
    ///
    /// # Errors
    /// When that fails.
    pub fn cut(&self) -> Result<()> {
        self.inside(&["ip", "link", "set", "eth0", "down"])
    }

    /// Mends the cable.
    ///
    /// # Errors
    /// When that fails.
    pub fn mend(&self) -> Result<()> {
        self.inside(&["ip", "link", "set", "eth0", "up"])
    }

    /// Mounts what it exports at `target`: a client of its own, with nothing shared
    /// with other mounts.
    ///
    /// # Errors
    /// When that fails.
    pub fn mount(&mut self, target: &Path, mode: Mode) -> Result<()> {
        self.mount_from(&self.exported.clone(), target, mode)
    }

    /// The same with a directory below what it exports.
    ///
    /// # Errors
    /// When that fails.
    pub fn mount_from(&mut self, from: &Path, target: &Path, mode: Mode) -> Result<()> {
        let options = match mode {
            Mode::Hard => "hard,nosharecache",
            Mode::Soft => "soft,nosharecache",
        };
        let from = format!("{SERVER}:{}", from.display());
        let since = Instant::now();
        loop {
            let target = target.to_string_lossy();
            let tried = run(&["mount", "-t", "nfs4", "-o", options, &from, &target]);
            match tried {
                Ok(()) => break,
                Err(error) if since.elapsed() > PATIENCE => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(500)),
            }
        }
        self.mounts.push(target.to_owned());
        Ok(())
    }

    /// Ends a mount, whoever still uses it.
    ///
    /// # Errors
    /// When nothing is mounted there.
    pub fn unmount(&mut self, target: &Path) -> Result<()> {
        self.mounts.retain(|mount| mount != target);
        run(&["umount", "--lazy", "--force", &target.to_string_lossy()])
    }

    /// Runs a command in the server's network namespace.
    ///
    /// # Errors
    /// When it fails; with what it said.
    pub fn inside(&self, words: &[&str]) -> Result<()> {
        let net = format!("--net=/run/netns/{NAMESPACE}");
        run(&[&["nsenter", &net], words].concat())
    }

    fn daemon(&mut self, words: &[&str]) -> Result<()> {
        let child = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{NAMESPACE}"))
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {}", words.join(" ")))?;
        self.daemons.push(child);
        // It writes no pid file; what is wrong shows soon.
        std::thread::sleep(Duration::from_millis(300));
        if let Some(status) = self.daemons.last_mut().map(Child::try_wait).transpose()? {
            ensure!(
                status.is_none(),
                "{} ended at once: {status:?}",
                words.join(" ")
            );
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Clients first, while somebody answers them.
        let _ = self.mend();
        let _ = self.up();
        let (control, clients): (Vec<_>, Vec<_>) = self
            .mounts
            .drain(..)
            .partition(|mount| mount.starts_with("/proc") || mount.starts_with("/run"));
        for mount in clients.iter().rev() {
            let text = mount.to_string_lossy();
            if run(&["umount", &text]).is_err() {
                let _ = run(&["umount", "--lazy", "--force", &text]);
            }
        }
        let _ = self.down();
        let _ = self.inside(&["exportfs", "-ua"]);
        for daemon in &mut self.daemons {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        for mount in control.iter().rev() {
            let _ = run(&["umount", "--lazy", &mount.to_string_lossy()]);
        }
        for directory in &self.own_directories {
            let _ = fs::remove_dir_all(directory);
        }
        // The cable goes with the namespace.
        let _ = run(&["ip", "netns", "del", NAMESPACE]);
        let _ = run(&["ip", "link", "del", CABLE]);
    }
}

fn run(words: &[&str]) -> Result<()> {
    let [program, arguments @ ..] = words else {
        bail!("nothing to run");
    };
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {program}"))?;
    ensure!(
        output.status.success(),
        "{} failed ({}): {}",
        words.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(())
}
