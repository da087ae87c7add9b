//! Randomly chosen faults, injected into groups of threads and of sockets.
//!
//! Seeded. The suite runs a few schedules; `CANDLE_NORM_FAULTS=200` says how many instead:
//!
//! ```text
//! CANDLE_NORM_FAULTS=200 cargo test --test suite faults -- --nocapture
//! ```
//!
//! Over sockets the faulty rank's connection goes through a relay that, after a number of bytes chosen at
//! random, cuts it, stalls, trickles, or turns, drops, adds or replaces bytes: whatever a broken machine or
//! network may do, at every place of the protocol.

use super::cases::Group;
use super::schedule::{Fault, Log, Schedule};
use super::tcp::{address, TOKEN};
use candle_core::Result;
use candle_norm::distributed::{LocalGroup, TcpGroup};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longer than a step takes on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Runs schedules several at a time: they mostly wait.
fn schedules(few: usize, name: &str, one: impl Fn(u64) -> std::result::Result<bool, String> + Sync) {
    let count = match std::env::var("CANDLE_NORM_FAULTS") {
        Ok(count) => count.parse().expect("CANDLE_NORM_FAULTS is a number"),
        // The kernels do not matter here.
        Err(_) => crate::common::sized(few, 1),
    };
    let (next, injected) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let start = Instant::now();
    let worker = || loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= count {
            return;
        }
        if one(seed as u64).unwrap_or_else(|e| panic!("seed {seed}: {e}")) {
            injected.fetch_add(1, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(worker);
        }
    });
    let injected = injected.into_inner();
    println!("{name}: {count} schedules, {injected} faults injected, none lost, {:?}", start.elapsed());
    assert!(2 * injected >= count, "{injected} faults in {count} schedules");
}

fn run(schedule: &Schedule, rank: impl Fn(usize) -> Result<Group> + Sync) -> Vec<Result<Log>> {
    std::thread::scope(|scope| {
        let rank = &rank;
        let one = |r| scope.spawn(move || rank(r).map(|group| schedule.run(group)));
        let ranks: Vec<_> = (0..schedule.ranks).map(one).collect();
        ranks.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

#[test]
fn faults_of_threads() {
    schedules(4, "threads", |seed| {
        let fault = [Fault::Leave, Fault::Late, Fault::Other, Fault::Twice][seed as usize % 4];
        let schedule = Schedule::new(seed, 2 + seed as usize % 4, fault, TIMEOUT);
        let groups = LocalGroup::with_timeout(schedule.ranks, TIMEOUT).unwrap();
        let groups: Vec<_> = groups.into_iter().map(|group| std::sync::Mutex::new(Some(group))).collect();
        let logs = run(&schedule, |rank| Ok(Arc::new(groups[rank].lock().unwrap().take().unwrap()) as Group));
        logs.into_iter().try_for_each(|log| schedule.check(&log.unwrap()))?;
        Ok(true)
    });
}

#[test]
fn faults_of_processes_over_tcp() {
    schedules(4, "tcp", |seed| {
        let fault = [Fault::Leave, Fault::Late, Fault::Other, Fault::Twice][seed as usize % 4];
        let schedule = Schedule::new(seed, 2 + seed as usize % 4, fault, TIMEOUT);
        let address = address();
        let logs = run(&schedule, |rank| {
            Ok(Arc::new(TcpGroup::connect(&address, TOKEN, rank, schedule.ranks, TIMEOUT)?) as Group)
        });
        logs.into_iter().try_for_each(|log| schedule.check(&log.map_err(|e| e.to_string())?))?;
        Ok(true)
    });
}

/// What the relay does once enough bytes have passed.
#[derive(Debug, Clone, Copy)]
enum Harm {
    Cut,
    Stall,
    Trickle,
    Turn,
    Drop,
    Add,
    Noise,
}

/// Wherever it happens: no rank gets a wrong result or half an update, none waits for ever, and after a
/// failure every later call fails.
#[test]
fn faults_of_the_wire() {
    schedules(7, "wire", |seed| {
        use Harm::*;
        let harm = [Cut, Stall, Trickle, Turn, Drop, Add, Noise][seed as usize % 7];
        let schedule = Schedule::new(seed, 2 + seed as usize % 3, Fault::None, TIMEOUT);
        let mut random = StdRng::seed_from_u64(!seed);
        // Half of them among the greetings and small messages, half anywhere.
        let most = if random.random() { 600 } else { 60_000 };
        let after = random.random_range(0..most);
        let relay = Relay { harm, after, upward: random.random(), seed, fired: AtomicBool::new(false) };
        let faulty = random.random_range(1..schedule.ranks);
        let (address, door) = (address(), TcpListener::bind("127.0.0.1:0").unwrap());
        let through = door.local_addr().unwrap().to_string();
        let over = AtomicBool::new(false);
        let logs = std::thread::scope(|scope| {
            let (relay, target, over) = (&relay, &address, &over);
            scope.spawn(move || relay.serve(&door, target, over));
            let logs = run(&schedule, |rank| {
                let address = if rank == faulty { &through } else { &address };
                Ok(Arc::new(TcpGroup::connect(address, TOKEN, rank, schedule.ranks, TIMEOUT)?) as Group)
            });
            over.store(true, Ordering::Relaxed);
            logs
        });
        let fired = relay.fired.load(Ordering::Relaxed);
        let fail = |why: &str| Err(format!("{why}: {harm:?} after {after}, {schedule:?}\n{logs:?}"));
        for log in logs.iter().flatten() {
            let first = log.outcomes.iter().position(|outcome| outcome.is_err());
            let after = &log.outcomes[first.unwrap_or(log.outcomes.len())..];
            if !log.wrong.is_empty() {
                return fail("a wrong result");
            }
            if log.longest > TIMEOUT * 2 + Duration::from_secs(10) {
                return fail("a call took too long");
            }
            if after.iter().any(|outcome| outcome.is_ok()) {
                return fail("a broken group went on");
            }
        }
        let fine = |log: &Result<Log>| matches!(log, Ok(log) if log.outcomes.iter().all(|o| o.is_ok()));
        if !fired && !logs.iter().all(fine) {
            return fail("an error without a fault");
        }
        Ok(fired)
    });
}

struct Relay {
    harm: Harm,
    after: usize,
    /// Towards rank 0, or from it.
    upward: bool,
    seed: u64,
    fired: AtomicBool,
}

impl Relay {
    fn serve(&self, door: &TcpListener, target: &str, over: &AtomicBool) {
        door.set_nonblocking(true).unwrap();
        let pause = Duration::from_millis(5);
        std::thread::scope(|scope| {
            while !over.load(Ordering::Relaxed) {
                let Ok((caller, _)) = door.accept() else {
                    std::thread::sleep(pause);
                    continue;
                };
                caller.set_nonblocking(false).unwrap();
                let target = loop {
                    match TcpStream::connect(target) {
                        Ok(stream) => break stream,
                        Err(_) if over.load(Ordering::Relaxed) => return,
                        Err(_) => std::thread::sleep(pause),
                    }
                };
                let (up, down) = (self.upward, !self.upward);
                let (caller2, target2) = (caller.try_clone().unwrap(), target.try_clone().unwrap());
                scope.spawn(move || self.pump(&caller, &target, up, over));
                scope.spawn(move || self.pump(&target2, &caller2, down, over));
            }
        });
    }

    fn pump(&self, mut from: &TcpStream, mut to: &TcpStream, harmed: bool, over: &AtomicBool) {
        let mut random = StdRng::seed_from_u64(self.seed);
        let mut passed = 0;
        let mut buffer = [0; 4096];
        from.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        while !over.load(Ordering::Relaxed) {
            let n = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e)
                    if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
                {
                    continue
                }
                Err(_) => break,
            };
            let mut bytes = buffer[..n].to_vec();
            let due = harmed && passed + n > self.after;
            let first = due && passed <= self.after;
            let at = self.after.saturating_sub(passed).min(n);
            passed += n;
            if first {
                self.fired.store(true, Ordering::Relaxed);
            }
            match self.harm {
                Harm::Cut if first => {
                    let _ = to.write_all(&bytes[..at]);
                    let _ = from.shutdown(Shutdown::Both);
                    break;
                }
                Harm::Stall if due => {
                    let _ = to.write_all(&bytes[..if first { at } else { 0 }]);
                    continue;
                }
                Harm::Trickle if due => {
                    for byte in &bytes {
                        std::thread::sleep(Duration::from_millis(150));
                        if over.load(Ordering::Relaxed) || to.write_all(&[*byte]).is_err() {
                            break;
                        }
                    }
                    continue;
                }
                Harm::Turn if first => bytes[at.min(n - 1)] ^= 1 << random.random_range(0..8),
                Harm::Drop if first => drop(bytes.drain(at.min(n - 1)..)),
                Harm::Add if first => {
                    let extra: Vec<u8> = (0..random.random_range(1..200)).map(|_| random.random()).collect();
                    bytes.splice(at..at, extra);
                }
                Harm::Noise if due => {
                    bytes.iter_mut().skip(if first { at } else { 0 }).for_each(|b| *b = random.random())
                }
                _ => {}
            }
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    }
}
