//! Where daemon and client keep what lives as long as the machine is up.
//!
//! | path beneath the run directory | what | whose |
//! |---|---|---|
//! | `ublk-server.sock` (default) | admin socket | daemon |
//! | `daemon.lock` | locked by the running daemon | daemon |
//! | `journal/` | one file per export | daemon |
//! | `keeper.sock` | what keeps FUSE connections beyond the daemon | keeper |
//! | `client.lock` | locked while a client mounts or unmounts | client |
//! | `mounts/` | one file per mounted image | client |
//! | `exports/<root>` | FUSE files | client |
//! | `layers/<24 digits of root>/` | mounted EROFS images | client |
//!
//! Names of layers are short because the option string of an overlay mount is.

use accel_oci::Digest;
use accel_ufs::index::Root;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Where the socket is unless something else is said.
pub const SOCKET: &str = "/run/image-accel/ublk-server.sock";

/// The run directory and what lies in it.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The admin socket.
    pub socket: PathBuf,
    /// The run directory.
    pub run: PathBuf,
}

impl Paths {
    /// The paths for a socket. Without `run`, the run directory is the socket's
    /// own for the default socket, else the socket's path with `.d` appended: so
    /// client and daemon agree when both are told only the socket.
    pub fn new(socket: &Path, run: Option<PathBuf>) -> Self {
        let socket = std::path::absolute(socket).unwrap_or_else(|_| socket.to_owned());
        let beside = || match socket.parent() {
            Some(parent) if socket == Path::new(SOCKET) => parent.to_owned(),
            _ => {
                let mut path = OsString::from(&socket);
                path.push(".d");
                PathBuf::from(path)
            }
        };
        let run = run.map_or_else(beside, |run| std::path::absolute(&run).unwrap_or(run));
        Self { socket, run }
    }

    /// Locked by the running daemon.
    pub fn daemon_lock(&self) -> PathBuf {
        self.run.join("daemon.lock")
    }

    /// Where the connection keeper listens.
    pub fn keeper(&self) -> PathBuf {
        self.run.join("keeper.sock")
    }

    /// Locked while a client changes mounts.
    pub fn client_lock(&self) -> PathBuf {
        self.run.join("client.lock")
    }

    /// One file per mounted image.
    pub fn mounts(&self) -> PathBuf {
        self.run.join("mounts")
    }

    /// The file of the image mounted at `directory`.
    pub fn note(&self, directory: &Path) -> PathBuf {
        let name = Digest::of(directory.as_os_str().as_bytes()).hex();
        self.mounts().join(format!("{name}.json"))
    }

    /// Where such a file is written before it gets its name.
    pub fn unfinished_note(&self) -> PathBuf {
        self.run.join("mount.tmp")
    }

    /// Directory of FUSE files.
    pub fn exports(&self) -> PathBuf {
        self.run.join("exports")
    }

    /// The FUSE file of a layer.
    pub fn export(&self, root: Root) -> PathBuf {
        self.exports().join(root.to_string())
    }

    /// Directory of mounted layers.
    pub fn layers(&self) -> PathBuf {
        self.run.join("layers")
    }

    /// Where a layer's EROFS image is mounted.
    pub fn layer(&self, root: Root) -> PathBuf {
        self.layers().join(&root.to_string()[..24])
    }

    /// Removes the clients' directories as far as they are empty, and the run
    /// directory if nothing else is in it.
    pub fn tidy(&self) {
        for directory in [self.mounts(), self.exports(), self.layers()] {
            // Fails if there is something in it, and then it stays.
            let _ = std::fs::remove_dir(directory);
        }
        let _ = std::fs::remove_dir(&self.run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_run_directory_follows_from_the_socket() {
        let of = |socket: &str| Paths::new(Path::new(socket), None).run;
        assert_eq!(of(SOCKET), Path::new("/run/image-accel"));
        assert_eq!(of("/tmp/s.sock"), Path::new("/tmp/s.sock.d"));
        let told = Paths::new(Path::new(SOCKET), Some("/run/x".into()));
        assert_eq!(told.run, Path::new("/run/x"));
    }
}
