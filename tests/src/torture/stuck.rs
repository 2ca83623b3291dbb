//! UFS hangs in the kernel: a FUSE file system has taken a read and never answers, so
//! that the process which asked cannot be killed. All of this has to be done while it
//! still hangs: the old daemon dies, the next one takes every device over, readers get
//! their bytes from the replica, images come and go, the daemon ends.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::OFlags;

use super::images::{self, Made};
use super::node::{Node, Serve};
use crate::Setting;

/// Only a bound for what hangs.
const HANG: Duration = Duration::from_secs(240);

/// Runs it, with that many devices.
///
/// # Errors
/// When anything waits for the file system that hangs.
pub fn run(setting: &Setting, devices: u64) -> Result<()> {
    let scratch = setting.scratch_dir()?;
    let at = |name: &str| -> Result<PathBuf> {
        let path = scratch.path().join(name);
        fs::create_dir(&path)?;
        Ok(path)
    };
    let (store, ufs, directory) = (at("store")?, at("ufs")?, at("node")?);
    let stall = scratch.path().join("stall");
    let mkfs = setting.bin.join("mkfs-accel");
    let images = (0..devices)
        .map(|number| images::make(&mkfs, &store, scratch.path(), 9, number, 4 << 20))
        .collect::<Result<Vec<_>>>()?;
    let mut server = Command::new(std::env::current_exe()?)
        .arg("passthrough")
        .args([&store, &ufs, &stall])
        .stdin(Stdio::null())
        .spawn()
        .context("starting the FUSE file system")?;
    let since = Instant::now();
    while !super::is_mounted(&ufs)? {
        ensure!(
            since.elapsed() < HANG,
            "the FUSE file system does not appear"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    let node = Node::start(Serve {
        program: setting.ublk_server(),
        sources: vec![ufs.clone(), store.clone()],
        transport: setting.transport.clone(),
        directory,
        further: Vec::new(),
    })?;
    let result = play(&node, &images, &stall, scratch.path());
    if result.is_err() {
        println!("--- the daemon's log\n{}", node.log(40));
    }
    // Whatever happened: what hangs goes on, so that all can end.
    let _ = fs::remove_file(&stall);
    node.end();
    end(&mut server, &ufs);
    if result.is_err() {
        super::sweep(scratch.path());
    }
    result
}

fn end(server: &mut Child, ufs: &Path) {
    let _ = rustix::mount::unmount(ufs, rustix::mount::UnmountFlags::DETACH);
    let _ = server.kill();
    let _ = server.wait();
}

fn play(node: &Node, images: &[Made], stall: &Path, scratch: &Path) -> Result<()> {
    let ask = |words: &[&str]| -> Result<String> {
        let output = node.client(words)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{}: {said}", words.join(" "));
        Ok(String::from_utf8(output.stdout)?)
    };
    let mut devices = Vec::new();
    for made in images {
        devices.push(PathBuf::from(ask(&["attach", &made.digest])?.trim()));
    }
    read(&devices[0], &images[0], 0)?;

    fs::write(stall, "")?;
    // The first to read has UFS asked, and hang; the replica answers it.
    read(&devices[0], &images[0], 1)?;
    let stuck = await_stuck(node)?;
    for round in 0..3 {
        let since = Instant::now();
        // Readers in flight while it is killed.
        std::thread::scope(|scope| {
            let reads: Vec<_> = devices
                .iter()
                .zip(images)
                .map(|(device, made)| scope.spawn(move || read(device, made, 2 + round)))
                .collect();
            node.kill()?;
            let died = since.elapsed();
            node.await_answer(HANG)?;
            let answered = since.elapsed();
            for read in reads {
                read.join()
                    .map_err(|_| anyhow::anyhow!("a reader panicked"))??;
            }
            println!(
                "stuck: {} devices; from SIGKILL to its death {} ms, to the next one's answer {} ms, \
                 to the last read's end {} ms",
                devices.len(),
                died.as_millis(),
                answered.as_millis(),
                since.elapsed().as_millis()
            );
            Ok::<_, anyhow::Error>(())
        })?;
        ensure!(stall.exists(), "it does not hang any more");
    }
    ensure!(
        Path::new(&format!("/proc/{stuck}")).exists(),
        "the stuck process {stuck} is gone: nothing hung"
    );
    let root = scratch.join("root");
    fs::create_dir(&root)?;
    let root = root.to_string_lossy();
    ask(&["mount", &images[0].digest, &root])?;
    ask(&["unmount", &root])?;
    for made in images {
        ask(&["detach", &made.digest])?;
    }
    node.stop()?;
    ensure!(
        Path::new(&format!("/proc/{stuck}")).exists(),
        "the stuck process {stuck} is gone: nothing hung"
    );
    Ok(())
}

/// Waits until a worker sits in the kernel, where no signal reaches it; its process.
fn await_stuck(node: &Node) -> Result<u32> {
    let since = Instant::now();
    loop {
        for worker in node.workers() {
            let tasks = fs::read_dir(format!("/proc/{worker}/task"));
            for task in tasks.into_iter().flatten().flatten() {
                let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
                if status.contains("\nState:\tD") {
                    return Ok(worker);
                }
            }
        }
        ensure!(
            since.elapsed() < HANG,
            "no worker is stuck: nothing is tested"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Reads a piece of a device past all caches, and compares.
fn read(device: &Path, made: &Made, number: usize) -> Result<()> {
    const PIECE: usize = 256 << 10;
    let file: File = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(device)?;
    let offset = number * PIECE % (made.image().len() - PIECE) / 4096 * 4096;
    let mut room = vec![0; PIECE + 4096];
    let start = room.as_ptr().align_offset(4096);
    let found = &mut room[start..start + PIECE];
    file.read_exact_at(found, offset as u64)
        .with_context(|| format!("reading {}", device.display()))?;
    ensure!(
        *found == made.image()[offset..offset + PIECE],
        "{}: WRONG BYTES at {offset}",
        device.display()
    );
    Ok(())
}
