//! A daemon's life over FUSE on this machine: upgrades, leftovers, shutdown, rescue. Needs
//! what `daemon.rs` needs.

mod common;

use common::node::{
    Node, PROGRAM, big, check_big, children, drop_caches, field, kill, mounted, nap, serve,
    serve_by, serve_with,
};
use common::{publish_image, publish_tree};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

const RESCUE: &str = env!("CARGO_BIN_EXE_ublk-rescue");

#[test]
fn an_upgrade_under_load_is_not_noticed() {
    let (mut node, _, root, files) = mounted();
    let before = node.status();
    let copy = node.path("another-ublk-server");
    fs::copy(PROGRAM, &copy).unwrap();
    let (over, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Relaxed) {
                    check_big(&root, &files);
                    reads.fetch_add(1, Relaxed);
                }
            });
        }
        let mut descriptors = Vec::new();
        for round in 0..4 {
            let seen = reads.load(Relaxed);
            while reads.load(Relaxed) < seen + 2 {
                nap();
            }
            let program = if round % 2 == 0 {
                copy.as_path()
            } else {
                Path::new(PROGRAM)
            };
            let text = program.to_str().unwrap();
            let said = if round == 1 {
                // This program, as nothing else is said.
                node.ask(&["upgrade"])
            } else {
                node.ask(&["upgrade", "--program", text])
            };
            assert!(
                said.contains(text) && said.contains("1 exports go on"),
                "{said}"
            );
            let status = node.status();
            assert_eq!(status["pid"], before["pid"], "the process stays");
            assert_eq!(status["program"].as_str().unwrap(), text);
            let pid = status["pid"].to_string();
            // Nothing of the program before stays open: the sockets of clients and
            // of workers come and go.
            let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
            let open = open.filter_map(|file| fs::read_link(file.path()).ok());
            let fuse = open.filter(|to| to == Path::new("/dev/fuse")).count();
            descriptors.push(fuse);
        }
        assert_eq!(descriptors, [descriptors[0]; 4]);
        over.store(true, Relaxed);
    });
    let status = node.status();
    assert_eq!(status["failed_reads"], 0);
    assert_eq!(status["exports"][0]["errors"], 0);
    // Workers of earlier programs end, and are seen to.
    let pid = status["pid"].to_string();
    while children(&pid).iter().any(|child| {
        fs::read_to_string(format!("/proc/{child}/stat")).is_ok_and(|s| s.contains(") Z "))
    }) {
        nap();
    }
    assert!(node.child.try_wait().unwrap().is_none());
    node.ask(&["unmount", &root]);
    node.stop();
}

/// A script in the place of the daemon's program.
fn script(path: &Path, text: &str) -> String {
    fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_bad_upgrade_is_refused_or_recovered_from() {
    let (mut node, _, root, files) = mounted();
    let pid = node.status()["pid"].clone();
    let refuses = script(
        &node.path("refuses"),
        "echo cannot read that journal >&2; exit 3",
    );
    for (program, part) in [
        ("/bin/false", "exit status: 1"),
        (refuses.as_str(), "cannot read that journal"),
        ("/none/such", "/none/such"),
    ] {
        let message = node.refused(&["upgrade", "--program", program]);
        assert!(message.contains(part), "{part}: {message}");
        check_big(&root, &files[..1]);
    }
    assert_eq!(node.status()["pid"], pid);
    // It looks at everything, and then does not start.
    let text = "case \"$*\" in *--check*) echo 9.9;; *) exit 1;; esac";
    let fails = script(&node.path("fails"), text);
    let held = thread::scope(|scope| {
        let client = scope.spawn(|| node.client(&["upgrade", "--program", &fails]));
        while !matches!(fs::read_to_string(format!("/proc/{pid}/stat")), Ok(stat) if stat.contains(") Z "))
        {
            nap();
        }
        // Who reads meanwhile waits for the next one.
        let reader = scope.spawn(|| check_big(&root, &files[..1]));
        let child = serve(node.directory.path());
        reader.join().unwrap();
        let said = client.join().unwrap();
        assert!(!said.status.success(), "{said:?}");
        child
    });
    assert!(!node.child.wait().unwrap().success());
    node.child = held;
    check_big(&root, &files);
    node.ask(&["unmount", &root]);
    node.stop();
}

fn journal(node: &Node) -> PathBuf {
    let files = fs::read_dir(node.path("socket.d/journal")).unwrap();
    let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.remove(0)
}

fn end(node: &mut Node) {
    node.child.kill().unwrap();
    node.child.wait().unwrap();
}

#[test]
fn the_journal_of_a_newer_version_is_refused_and_left() {
    let (mut node, _, root, files) = mounted();
    end(&mut node);
    let entry = journal(&node);
    let real = fs::read_to_string(&entry).unwrap();
    let newer = real.replace("\"layout\": 2", "\"layout\": 99");
    assert_ne!(newer, real);
    fs::write(&entry, &newer).unwrap();
    let mut refused = serve(node.directory.path());
    assert!(!refused.wait().unwrap().success());
    let log = fs::read_to_string(node.path("log")).unwrap();
    let name = entry.file_name().unwrap().to_str().unwrap();
    assert!(log.contains("layout 99") && log.contains(name), "{log}");
    assert_eq!(fs::read_to_string(&entry).unwrap(), newer);
    // And one that is damaged costs itself alone: the daemon serves.
    fs::write(&entry, &real[..real.len() / 2]).unwrap();
    node.child = serve(node.directory.path());
    node.await_daemon();
    assert_eq!(node.status()["exports"].as_array().unwrap().len(), 0);
    end(&mut node);
    fs::write(&entry, &real).unwrap();
    node.child = serve(node.directory.path());
    node.await_daemon();
    // A connection that no entry knows was ended meanwhile.
    node.ask(&["unmount", &root]);
    drop(files);
    node.stop();
}

fn sleeper(directory: &Path) -> Child {
    Command::new("sleep")
        .arg("1000")
        .current_dir(directory)
        .spawn()
        .unwrap()
}

#[test]
fn leftovers_are_listed_and_removed_unless_they_are_in_use() {
    let (node, image, root, _) = mounted();
    assert!(!node.ask(&["list"]).contains("LEFT OVER"));
    // A client that died before it noted anything.
    let other = node.directory("other");
    let mut stream = UnixStream::connect(node.path("socket")).unwrap();
    let attach = serde_json::json!({"op": "attach", "image": image, "holder": other});
    writeln!(stream, "{attach}").unwrap();
    stream.read_to_string(&mut String::new()).unwrap();
    let said = node.ask(&["list"]);
    assert!(
        said.contains("LEFT OVER") && said.contains(&other),
        "{said}"
    );
    let said = node.ask(&["gc"]);
    assert!(said.contains("removed") && said.contains(&other), "{said}");
    // An image that somebody unmounted by hand, while a layer of it is in use.
    rustix::mount::unmount(&root, rustix::mount::UnmountFlags::empty()).unwrap();
    let layers = fs::read_dir(node.path("socket.d/layers"))
        .unwrap()
        .flatten();
    let layer = layers
        .map(|layer| layer.path())
        .find(|path| path.join("f1").exists());
    let mut user = sleeper(&layer.unwrap());
    let said = node.ask(&["list"]);
    assert!(said.contains(&root), "{said}");
    let said = node.ask(&["gc"]);
    assert!(said.contains("kept") && said.contains(&root), "{said}");
    assert_eq!(node.status()["exports"].as_array().unwrap().len(), 1);
    user.kill().unwrap();
    user.wait().unwrap();
    let said = node.ask(&["gc"]);
    assert!(said.contains("removed"), "{said}");
    assert_eq!(node.status()["exports"].as_array().unwrap().len(), 0);
    assert_eq!(node.ask(&["gc"]), "");
    assert!(!node.ask(&["list"]).contains("LEFT OVER"));
    node.stop();
}

#[test]
fn an_ordered_shutdown_names_who_is_in_the_way() {
    let (mut node, image, root, files) = mounted();
    let other = node.directory("other");
    node.ask(&["mount", &image, &other]);
    node.ask(&["attach", &image]);
    let mut user = sleeper(Path::new(&root));
    let message = node.refused(&["shutdown"]);
    let named = format!("sleep (process {})", user.id());
    assert!(
        message.contains(&named) && message.contains(&root),
        "{message}"
    );
    assert!(!message.contains(&other), "{message}");
    // The user lives and reads; all else is gone.
    assert!(user.try_wait().unwrap().is_none());
    check_big(&root, &files[..1]);
    let holders = node.status()["holders"].clone();
    assert_eq!(holders.as_array().unwrap().len(), 1, "{holders}");
    user.kill().unwrap();
    user.wait().unwrap();
    node.ask(&["shutdown", "--leave-daemon"]);
    assert_eq!(node.status()["exports"].as_array().unwrap().len(), 0);
    assert_eq!(node.mounts(), [""; 0]);
    node.ask(&["mount", &image, &root]);
    node.ask(&["shutdown"]);
    assert!(node.child.wait().unwrap().success());
    assert_eq!(node.mounts(), [""; 0]);
    assert!(!node.path("socket.d").exists() && !node.path("socket").exists());
}

#[test]
fn what_an_earlier_boot_left_is_in_nobodys_way() {
    let (mut node, image, root, files) = mounted();
    let keeper = node.status()["keeper"].clone();
    end(&mut node);
    // A node that crashed has neither mounts nor devices, and its files stay only if
    // the run directory is not on a tmpfs.
    for line in node.mounts().iter().rev() {
        let point = line.split(' ').nth(4).unwrap();
        rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
    while Path::new(&format!("/proc/{keeper}/fd/0")).exists() {
        nap();
    }
    let entry = journal(&node);
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&entry).unwrap()).unwrap();
    json["boot_id"] = "another".into();
    // Nor does its layout matter.
    json["layout"] = 99.into();
    json["later"] = "field".into();
    fs::write(&entry, json.to_string()).unwrap();
    fs::write(node.path("socket.d/keeper.sock"), "").unwrap();
    assert_eq!(
        fs::read_dir(node.path("socket.d/mounts")).unwrap().count(),
        1
    );
    node.child = serve(node.directory.path());
    node.await_daemon();
    assert!(!entry.exists());
    assert!(!node.ask(&["list"]).contains(&root));
    node.ask(&["mount", &image, &root]);
    check_big(&root, &files[..2]);
    node.ask(&["unmount", &root]);
    node.stop();
}

/// Whoever starts the next daemon may have such a file open, and its children close it.
#[test]
fn closing_a_file_waits_for_no_daemon() {
    let mut made = None;
    let mut node = Node::start(|ufs| made = Some(big(ufs)));
    let (image, files) = made.unwrap();
    // Attached only: who mounts closes files, too.
    node.ask(&["attach", &image]);
    let exports = fs::read_dir(node.path("socket.d/exports")).unwrap();
    let open: Vec<_> = exports
        .map(|entry| File::open(entry.unwrap().path()).unwrap())
        .collect();
    assert!(!open.is_empty());
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    let (closed, when) = std::sync::mpsc::channel();
    thread::spawn(move || {
        drop(open);
        closed.send(())
    });
    let in_time = when.recv_timeout(Duration::from_secs(30));
    node.child = serve(node.directory.path());
    node.await_daemon();
    in_time.expect("closing a file waits for the daemon");
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    check_big(&root, &files);
    node.ask(&["unmount", &root]);
    node.ask(&["detach", &image]);
    node.stop();
}

/// As when a node boots, and its mounts come late.
#[test]
fn a_ufs_that_comes_after_the_daemon_is_waited_for() {
    let (mut node, _, root, files) = mounted();
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    let (ufs, away) = (node.path("ufs"), node.path("away"));
    fs::rename(&ufs, &away).unwrap();
    let for_ever: [&OsStr; 2] = ["--request-timeout".as_ref(), "0".as_ref()];
    node.child = serve_with(node.directory.path(), &for_ever);
    node.await_daemon();
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            drop_caches();
            check_big(&root, &files);
        });
        let kept = node.status()["exports"].as_array().unwrap().len();
        assert!(kept > 0, "the export did not come back");
        std::thread::sleep(Duration::from_secs(3));
        assert!(!reader.is_finished(), "it did not wait");
        fs::rename(&away, &ufs).unwrap();
        reader.join().unwrap();
    });
    assert_eq!(node.status()["failed_reads"], 0);
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn without_a_daemon_for_good_readers_get_an_error() {
    let (mut node, image, root, files) = mounted();
    let socket = node.path("socket");
    let rescue = |after: &str| {
        let mut rescue = Command::new(RESCUE);
        rescue.args(["--after", after, "--socket"]).arg(&socket);
        let output = rescue.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(rescue("0s").contains("nothing to rescue"));
    check_big(&root, &files[..1]);
    let file = File::open(Path::new(&root).join("f2")).unwrap();
    end(&mut node);
    drop_caches();
    thread::scope(|scope| {
        let reader = scope.spawn(|| file.read_exact_at(&mut [0; 4096], 1 << 20));
        thread::sleep(Duration::from_millis(300));
        assert!(!reader.is_finished(), "it does not wait");
        let said = rescue("300ms");
        assert!(said.contains("closed the connection"), "{said}");
        assert!(reader.join().unwrap().is_err());
    });
    drop(file);
    // The node is of use: what is dead can be unmounted, and mounted anew.
    node.client(&["unmount", &root]);
    node.child = serve(node.directory.path());
    node.await_daemon();
    node.client(&["unmount", &root]);
    assert_eq!(node.mounts(), [""; 0]);
    node.ask(&["mount", &image, &root]);
    check_big(&root, &files);
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn a_service_manager_is_told() {
    let (mut node, _, root, files) = mounted();
    end(&mut node);
    let path = node.path("notify");
    let manager = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None).unwrap();
    rustix::net::bind(&manager, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    let bound = Some(Duration::from_secs(120));
    rustix::net::sockopt::set_socket_timeout(&manager, rustix::net::sockopt::Timeout::Recv, bound)
        .unwrap();
    let hear = || {
        let mut text = [0; 512];
        let (len, _) =
            rustix::net::recv(&manager, &mut text[..], rustix::net::RecvFlags::empty()).unwrap();
        String::from_utf8(text[..len].to_vec()).unwrap()
    };
    let mut command = Command::new(PROGRAM);
    command
        .env("NOTIFY_SOCKET", &path)
        .env("WATCHDOG_USEC", "300000");
    node.child = serve_by(command, &node.path(""), &[]);
    for _ in 0..2 {
        let ready = loop {
            match hear() {
                text if text.starts_with("READY=1") => break text,
                text => assert_eq!(text, "WATCHDOG=1"),
            }
        };
        assert!(ready.contains("STATUS=serving"), "{ready}");
        for _ in 0..3 {
            assert_eq!(hear(), "WATCHDOG=1");
        }
        check_big(&root, &files[..1]);
        node.ask(&["upgrade"]);
    }
    node.ask(&["unmount", &root]);
    kill_process(Pid::from_child(&node.child), Signal::TERM).unwrap();
    while hear() != "STOPPING=1" {}
    assert!(node.child.wait().unwrap().success());
}

#[test]
fn without_descriptors_clients_are_refused_and_readers_go_on() {
    let mut made = None;
    let mut node = Node::start(|ufs| {
        let other = publish_tree(ufs, "other", &[("file", Some(b"other"))]);
        made = Some((big(ufs), publish_image(ufs, &[other]).to_string()));
    });
    let ((image, files), other) = made.unwrap();
    end(&mut node);
    // The daemon may open 96 files in all.
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 96; exec \"$@\"", "sh", PROGRAM]);
    node.child = serve_by(command, &node.path(""), &[]);
    node.await_daemon();
    let (root, second) = (node.directory("root"), node.directory("second"));
    node.ask(&["mount", &image, &root]);
    let idle: Vec<_> = (0..96)
        .map(|_| UnixStream::connect(node.path("socket")).unwrap())
        .collect();
    let message = loop {
        let output = node.client(&["mount", &other, &second]);
        let message = String::from_utf8(output.stderr).unwrap();
        if message.contains("descriptors") || output.status.success() {
            break message;
        }
        nap();
    };
    assert!(message.contains("no file descriptors left"), "{message}");
    check_big(&root, &files);
    drop(idle);
    while !node.client(&["mount", &other, &second]).status.success() {
        nap();
    }
    check_big(&root, &files[..1]);
    node.ask(&["unmount", &second]);
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn a_full_run_directory_refuses_mounts_and_harms_nothing() {
    let mut made = None;
    let mut node = Node::start(|ufs| {
        let other = publish_tree(ufs, "other", &[("file", Some(b"other"))]);
        made = Some((big(ufs), publish_image(ufs, &[other]).to_string()));
    });
    let ((image, files), other) = made.unwrap();
    kill_process(Pid::from_child(&node.child), Signal::TERM).unwrap();
    assert!(node.child.wait().unwrap().success());
    let run = node.path("run");
    fs::create_dir(&run).unwrap();
    let size = Some(c"size=256k");
    rustix::mount::mount(
        "tmpfs",
        &run,
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        size,
    )
    .unwrap();
    let run = run.to_str().unwrap();
    node.child = serve_with(node.directory.path(), &["--run-dir".as_ref(), run.as_ref()]);
    let (root, second) = (node.directory("root"), node.directory("second"));
    while !node.client(&["list", "--run-dir", run]).status.success() {
        nap();
    }
    node.ask(&["mount", &image, &root, "--run-dir", run]);
    // Full, to the last byte.
    let mut filler = File::create(Path::new(run).join("filler")).unwrap();
    while filler.write(&[0; 4096]).is_ok_and(|written| written > 0) {}
    let message = node.refused(&["mount", &other, &second, "--run-dir", run]);
    assert!(message.contains("No space left"), "{message}");
    check_big(&root, &files);
    assert_eq!(node.status()["exports"].as_array().unwrap().len(), 1);
    drop(filler);
    fs::remove_file(Path::new(run).join("filler")).unwrap();
    node.ask(&["mount", &other, &second, "--run-dir", run]);
    node.ask(&["unmount", &second, "--run-dir", run]);
    node.ask(&["unmount", &root, "--run-dir", run]);
    kill_process(Pid::from_child(&node.child), Signal::TERM).unwrap();
    assert!(node.child.wait().unwrap().success());
    rustix::mount::unmount(run, rustix::mount::UnmountFlags::empty()).unwrap();
}

#[test]
fn mounting_over_and_over_leaks_nothing() {
    let (node, image, root, _) = mounted();
    let pid = node.status()["pid"].to_string();
    let open = |pid: &str| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let threads = |pid: &str| field(pid, "Threads").trim().parse::<usize>().unwrap();
    let round = || {
        node.ask(&["unmount", &root]);
        node.ask(&["mount", &image, &root]);
    };
    round();
    let keeper = |node: &Node| node.status()["keeper"].to_string();
    // Clients that hang up may be counted a moment longer.
    let now = || (open(&pid), threads(&pid));
    thread::sleep(Duration::from_millis(300));
    let before = now();
    let kept = open(&keeper(&node));
    let memory = node.memory_of_its_own();
    let full = std::env::var("ACCEL_TESTS_FULL").as_deref() == Ok("1");
    for _ in 0..if full { 1000 } else { 25 } {
        round();
    }
    // What was on its way when that was counted may have ended.
    let no_more = |(files, threads)| files <= before.0 && threads <= before.1;
    for _ in 0..3000 {
        if no_more(now()) {
            break;
        }
        nap();
    }
    assert!(
        no_more(now()),
        "{before:?} files and threads, then {:?}",
        now()
    );
    assert_eq!(open(&keeper(&node)), kept);
    let after = node.memory_of_its_own();
    assert!(after <= memory + (4 << 20), "{memory} -> {after} bytes");
    assert_eq!(
        fs::read_dir(node.path("socket.d/journal")).unwrap().count(),
        1
    );
    kill(&node.status()["sources"][0]["worker"], Signal::KILL);
    node.ask(&["unmount", &root]);
    node.stop();
}
