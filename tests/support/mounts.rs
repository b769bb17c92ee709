//! File systems that tests make for themselves: small ones in memory, and disks whose power can be
//! cut.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// The ioctl that stops an ext4 file system at once and loses what is not on its disk yet.
const EXT4_IOC_SHUTDOWN: u32 = 0x8004_587D;

/// What becomes of the file system's journal when the power is cut.
#[derive(Clone, Copy, Debug)]
pub enum Journal {
    /// The journal in memory still reaches the disk: renames and lengths, without the data.
    Written = 1,
    /// The journal in memory is lost as well.
    Lost = 2,
}

/// A mounted file system, unmounted when dropped.
pub struct Mount {
    dir: TempDir,
    /// The arguments of `mount`, used again after a power cut.
    arguments: Vec<String>,
}

impl Mount {
    /// A file system in memory of `size` (`2m`), or `None` if mounting is not allowed.
    pub fn in_memory(size: &str) -> Option<Self> {
        let dir = temporary_dir();
        let arguments = ["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"];
        Self { dir, arguments: arguments.map(str::to_owned).into() }.mounted()
    }

    /// An ext4 disk whose power can be cut, or `None` if it cannot be made.
    pub fn disk() -> Option<Self> {
        let dir = temporary_dir();
        let image = dir.path().join("disk.img");
        std::fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).unwrap();
        let image = image.to_str().expect("a plain name").to_owned();
        if !run("mkfs.ext4", &["-q", "-F", &image]) {
            return None;
        }
        // The loop device goes away with the unmount, even if this process is killed first.
        let arguments = ["-t", "ext4", "-o", "loop", &image];
        let disk = Self { dir, arguments: arguments.map(str::to_owned).into() }.mounted()?;
        let works = cut_power(&[], &[&disk], Journal::Lost);
        disk.restore_power();
        works.then_some(disk)
    }

    fn mounted(self) -> Option<Self> {
        std::fs::create_dir(self.path()).unwrap();
        self.mount().then_some(self)
    }

    fn mount(&self) -> bool {
        let mut arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let path = self.path();
        arguments.push(path.to_str().expect("a plain name"));
        run("mount", &arguments)
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }

    /// Takes all space except `room` bytes.
    pub fn fill_up(&self, room: u64) {
        let mut df = Command::new("df");
        df.args(["--block-size=1", "--output=avail"]).arg(self.path());
        let said = String::from_utf8(df.output().unwrap().stdout).unwrap();
        let free: u64 = said.lines().nth(1).unwrap().trim().parse().unwrap();
        let ballast = vec![1; free.saturating_sub(room) as usize];
        // The write stops early if a member wrote meanwhile.
        let _ = std::fs::write(self.path().join("ballast"), ballast);
    }

    /// Gives back what [`fill_up`](Self::fill_up) took.
    pub fn free(&self) {
        std::fs::remove_file(self.path().join("ballast")).unwrap();
    }

    /// Resizes a file system in memory.
    pub fn resize(&self, size: &str) {
        let (path, options) = (self.path(), format!("remount,size={size}"));
        assert!(run("mount", &["-o", &options, path.to_str().expect("a plain name")]));
    }

    /// Mounts what is on the disk after a power cut. No process may use it any more.
    pub fn restore_power(&self) {
        let path = self.path();
        assert!(run("umount", &[path.to_str().expect("a plain name")]), "{}", path.display());
        assert!(self.mount(), "{}", path.display());
        // The mount is still the old one if another mount namespace holds it.
        let probe = path.join("probe");
        let is_new = std::fs::write(&probe, b"").and_then(|()| std::fs::remove_file(&probe));
        assert!(is_new.is_ok(), "{} is still without power: {is_new:?}", path.display());
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let path = self.path();
        if std::thread::panicking() {
            let kept = path.with_extension("kept");
            let copied = run("cp", &["-a", &path.to_string_lossy(), &kept.to_string_lossy()]);
            let kept = if copied { &kept } else { self.dir.path() };
            eprintln!("what was in {} is kept in {}", path.display(), kept.display());
            self.dir.disable_cleanup(true);
        }
        // Lazily, because a process that was not killed yet may still use it.
        run("umount", &["-l", &path.to_string_lossy()]);
    }
}

/// Cuts the power: processes end, and data not synced to the disks is lost. Returns false if this
/// machine does not allow it.
///
/// The processes end first. A sync that is under way when the file system stops may report success,
/// and no process may live to pass that on. (A loop of appends and syncs, in C, that was not killed
/// first lost a "synced" record in 10 of 210 cuts; killed first, in 0 of 450.)
pub fn cut_power(pids: &[u32], disks: &[&Mount], journal: Journal) -> bool {
    let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
    let mut arguments = [EXT4_IOC_SHUTDOWN, journal as u32].map(|word| word.to_string()).to_vec();
    arguments.push(pids.join(" "));
    arguments.extend(disks.iter().map(|disk| disk.path().to_string_lossy().into_owned()));
    // An ioctl needs unsafe code in Rust, so an interpreter does it.
    let perl = "my ($request, $journal, $pids, @paths) = @ARGV;
my @disks = map { open(my $disk, '<', $_) or die; $disk } @paths;
kill 'KILL', split(' ', $pids);
for (@disks) { my $flags = pack('I', $journal); ioctl($_, $request, $flags) or die }";
    let python = "import fcntl, os, signal, struct, sys
request, journal, pids, *paths = sys.argv[1:]
disks = [os.open(path, os.O_RDONLY) for path in paths]
for pid in pids.split():
    os.kill(int(pid), signal.SIGKILL)
for disk in disks:
    fcntl.ioctl(disk, int(request), struct.pack('I', int(journal)))";
    let with = |interpreter: &str, flag: &str, program: &str| {
        let mut words = vec![flag, program];
        words.extend(arguments.iter().map(String::as_str));
        run(interpreter, &words)
    };
    // Python only if Perl is not installed: the power must not be cut twice.
    let perl_is_there = run("perl", &["-e", "1"]);
    if perl_is_there { with("perl", "-e", perl) } else { with("python3", "-c", python) }
}

fn temporary_dir() -> TempDir {
    tempfile::Builder::new().prefix("raftexample-mount-").tempdir().unwrap()
}

fn run(program: &str, arguments: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}
