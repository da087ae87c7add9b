//! A process group over TCP: rank 0 hears every rank, and answers.
//!
//! It needs nothing but a port, and takes the environment that launchers set. It is the rendezvous, and the
//! small case: it carries the unique id and the words of calls for NCCL, and serves a few processes where
//! MPI is not installed. The engines for clusters are MPI and NCCL.

mod rendezvous;
mod token;
mod wire;

use super::bytes::{combine, from_bytes, result_dims, to_bytes};
use super::split::{colors, Part};
use super::{check_root, describe, differ, error, lock, Deadline, Kind, ProcessGroup};
use candle_core::{bail, DType, Device, Result, Tensor};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use token::Token;
use wire::{garbage, Channel, Message, Tag, INLINE};

/// The ranks of a job whose processes reach rank 0 over TCP.
///
/// Rank 0 compares the calls, computes, and answers, so every call costs two messages a rank (four where a
/// rank brings more than 64 KiB) and all traffic meets at rank 0. A rank whose process ends or that drops
/// its handle fails its peers' calls; one that stays away fails them after the timeout, on rank 0, which
/// then tells the others: they have waited for rank 0 as well, so at most twice as long.
///
/// Who wants to be a rank shows the job's token, and rank 0 shows that it has it too. The token is made for
/// the job and written into the rendezvous file, which its owner alone can read ([`from_file`](Self::from_file)),
/// or comes from the environment ([`from_env`](Self::from_env)). It travels in the clear, as all else does:
/// it keeps out strangers who can reach the port, not those who can listen on the network. Nothing listens
/// beyond this machine unless an address says so.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::distributed::{ProcessGroup, TcpGroup};
/// # fn main() -> candle_core::Result<()> {
/// let file = std::env::temp_dir().join(format!("rendezvous-{}", std::process::id()));
/// let sums = std::thread::scope(|scope| {
///     let rank = |rank| {
///         let group = TcpGroup::from_file(&file, rank, 2)?;
///         group.all_reduce_sum("example", &Tensor::new(&[2f32], &Device::Cpu)?)?.to_vec1::<f32>()
///     };
///     let other = scope.spawn(move || rank(1));
///     [rank(0), other.join().unwrap()]
/// });
/// for sum in sums {
///     assert_eq!(sum?, [4.0]);
/// }
/// # std::fs::remove_file(&file).ok();
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct TcpGroup {
    rank: usize,
    world_size: usize,
    timeout: Duration,
    link: Mutex<Link>,
}

#[derive(Debug)]
struct Link {
    /// On rank 0 one for each other rank, in rank order; elsewhere the one to rank 0.
    channels: Vec<Channel>,
    /// Number of the next call.
    call: u64,
    broken: Option<String>,
}

impl TcpGroup {
    /// How long a rank waits for its peers, to connect and in one call, unless told otherwise: 5 minutes.
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);

    /// The group that the environment describes as `torchrun` does: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`
    /// (this machine, if not set) and `MASTER_PORT`; and `CANDLE_NORM_TOKEN`, 32 random characters or more
    /// that are the same on all ranks:
    ///
    /// ```text
    /// CANDLE_NORM_TOKEN=$(openssl rand -hex 32) torchrun --no-python --nproc-per-node 4 program
    /// ```
    ///
    /// Under `torchrun` itself, whose own store has that port, the one after it is used.
    ///
    /// # Errors
    /// A variable that is missing or no number, and ranks that do not connect within the timeout.
    pub fn from_env() -> Result<Self> {
        let (rank, world_size) = (env_number("RANK")?, env_number("WORLD_SIZE")?);
        let host = std::env::var("MASTER_ADDR").unwrap_or_else(|_| LOOPBACK.to_string());
        let agent = std::env::var("TORCHELASTIC_USE_AGENT_STORE").is_ok_and(|value| value == "True");
        let port = env_number("MASTER_PORT")?.saturating_add(usize::from(agent));
        let token = env("CANDLE_NORM_TOKEN")?;
        Self::connect(&format!("{host}:{port}"), &token, rank, world_size, Self::DEFAULT_TIMEOUT)
    }

    /// The group of `world_size` processes that share a file system: rank 0 writes to `path` where it can
    /// be reached and a token, and the others wait for that. The file must not exist before, belongs to one
    /// job, and can be read by its owner alone. Rank 0 listens on `MASTER_ADDR`, or on this machine alone.
    ///
    /// # Errors
    /// A file that cannot be written, already exists or is open to others, and ranks that do not connect
    /// within the timeout.
    pub fn from_file(path: impl AsRef<Path>, rank: usize, world_size: usize) -> Result<Self> {
        let (path, timeout) = (path.as_ref(), Self::DEFAULT_TIMEOUT);
        check_rank(rank, world_size)?;
        if rank > 0 {
            let found = wait_for(timeout, &format!("rank 0's address in {}", path.display()), |_| {
                token::find(path).transpose()
            })?;
            let (address, token) = found?;
            return Self::call(&address, &token, rank, world_size, timeout);
        }
        let host = std::env::var("MASTER_ADDR").unwrap_or_else(|_| LOOPBACK.to_string());
        let listener = TcpListener::bind((host.as_str(), 0)).map_err(|e| failed("listen on", &host, &e))?;
        let address = listener.local_addr().map_err(|e| failed("listen on", &host, &e))?;
        let token = Token::random()?;
        token::publish(path, &address.to_string(), &token)
            .map_err(|e| failed("write", &path.display().to_string(), &e))?;
        Self::answer(&listener, &token, world_size, timeout)
    }

    /// The group whose rank 0 listens on `address`, a `host:port`, and whose ranks all know `token`: 32 to
    /// 1024 random characters.
    ///
    /// # Errors
    /// A short token, an address that rank 0 cannot listen on, and ranks that do not connect within the
    /// timeout.
    pub fn connect(
        address: &str,
        token: &str,
        rank: usize,
        world_size: usize,
        timeout: Duration,
    ) -> Result<Self> {
        check_rank(rank, world_size)?;
        let token = Token::new(token)?;
        if rank > 0 {
            return Self::call(address, &token, rank, world_size, timeout);
        }
        let listener = TcpListener::bind(address).map_err(|e| failed("listen on", address, &e))?;
        Self::answer(&listener, &token, world_size, timeout)
    }

    fn answer(listener: &TcpListener, token: &Token, world_size: usize, timeout: Duration) -> Result<Self> {
        Ok(Self::of(0, world_size, timeout, rendezvous::answer(listener, token, world_size, timeout)?))
    }

    fn call(address: &str, token: &Token, rank: usize, world_size: usize, timeout: Duration) -> Result<Self> {
        let channel = rendezvous::call(address, token, rank, world_size, timeout)?;
        Ok(Self::of(rank, world_size, timeout, vec![channel]))
    }

    fn of(rank: usize, world_size: usize, timeout: Duration, channels: Vec<Channel>) -> Self {
        Self { rank, world_size, timeout, link: Mutex::new(Link { channels, call: 1, broken: None }) }
    }

    fn exchange(&self, kind: Kind, what: &str, tensor: &Tensor) -> Result<Tensor> {
        let words = describe(kind, what, tensor);
        let host = tensor.detach().to_device(&Device::Cpu)?.flatten_all()?.contiguous()?;
        let call = Call { kind, words, payload: to_bytes(&host)?, host };
        let dims = result_dims(kind, tensor, self.world_size);
        let bytes = self.world_size.checked_mul(call.payload.len());
        let Some(most) = bytes else { bail!("tcp-group: {} is too large", call.words) };
        let mut link = lock(&self.link);
        if let Some(broken) = &link.broken {
            return Err(error(broken.clone()));
        }
        let outcome = match self.rank {
            0 => self.serve(&mut link, call),
            _ => self.ask(&mut link, call, most),
        };
        link.call += 1;
        match outcome {
            Ok(Ok(bytes)) => from_bytes(&bytes, tensor.dtype(), &dims)?.to_device(tensor.device()),
            // The ranks disagree, and all know: the group works on.
            Ok(Err(words)) => Err(error(words)),
            Err(words) => {
                link.broken = Some(words.clone());
                link.channels.iter().for_each(Channel::end);
                Err(error(words))
            }
        }
    }

    /// Rank 0: hears all, computes, answers all. `Err` where a rank is gone.
    fn serve(&self, link: &mut Link, call: Call) -> std::result::Result<Answer, String> {
        let number = link.call;
        let outcome = self.collect(link, &call);
        let told = match &outcome {
            Ok(Ok(bytes)) => Message::new(Tag::Done, number).payload(bytes.clone()),
            Ok(Err(words)) => Message::new(Tag::Refused, number).words(words),
            Err(words) => Message::new(Tag::Broken, number).words(words),
        };
        let by = Deadline::after(self.timeout);
        for i in 0..link.channels.len() {
            let Err(e) = link.channels[i].send(&told, by) else { continue };
            if outcome.is_err() {
                // A peer that cannot be told finds the connection closed.
                continue;
            }
            let reason = self.gone(i + 1, &call.words, &e);
            let broken = Message::new(Tag::Broken, number).words(&reason);
            // Not the one that may have half a message. Those that have the result hear it in their next call.
            for (_, channel) in link.channels.iter_mut().enumerate().filter(|(other, _)| *other != i) {
                let _ = channel.send(&broken, by);
            }
            return Err(reason);
        }
        outcome
    }

    /// What all ranks bring to the call, combined.
    fn collect(&self, link: &mut Link, call: &Call) -> std::result::Result<Answer, String> {
        let (number, by, n) = (link.call, Deadline::after(self.timeout), call.payload.len());
        let mut calls = vec![(super::digest(call.words.as_bytes()), call.words.clone())];
        let mut brought = vec![];
        for (i, channel) in link.channels.iter_mut().enumerate() {
            let heard = expect(channel, &[Tag::Call], number, INLINE, by);
            let heard = heard.map_err(|e| self.gone(i + 1, &call.words, &e))?;
            calls.push((heard.digest, heard.text()));
            brought.push(heard.payload);
        }
        if let Some(words) = differ(&calls) {
            return Ok(Err(words));
        }
        for (i, channel) in link.channels.iter_mut().enumerate() {
            if n > INLINE {
                let asked = channel.send(&Message::new(Tag::More, number), by);
                let heard = asked.and_then(|()| expect(channel, &[Tag::Payload], number, n, by));
                brought[i] = heard.map_err(|e| self.gone(i + 1, &call.words, &e))?.payload;
            }
            if brought[i].len() != n {
                let e = garbage(format!("{} bytes, expected {n}", brought[i].len()));
                return Err(self.gone(i + 1, &call.words, &e));
            }
        }
        let all = std::iter::once(&call.payload).chain(&brought).map(Vec::as_slice);
        Ok(combine(call.kind, all, call.host.dtype(), call.host.elem_count())
            .and_then(|result| to_bytes(&result))
            .map_err(|e| e.to_string()))
    }

    /// The other ranks: tell rank 0 and take its answer, of at most `most` bytes. `Err` where rank 0 is gone.
    fn ask(&self, link: &mut Link, call: Call, most: usize) -> std::result::Result<Answer, String> {
        let number = link.call;
        let n = call.payload.len();
        let result = if call.kind == Kind::Gather { most } else { n };
        // Rank 0 may have come just before the time was up, and wait for others as long.
        let by = Deadline::after(self.timeout.saturating_mul(2));
        let (inline, large) = if n <= INLINE { (call.payload, None) } else { (vec![], Some(call.payload)) };
        let talk = |channel: &mut Channel| {
            channel.send(&Message::new(Tag::Call, number).words(&call.words).payload(inline), by)?;
            let answers = [Tag::Done, Tag::Refused, Tag::Broken];
            if let Some(payload) = large {
                let heard = expect(channel, &[Tag::More, Tag::Refused, Tag::Broken], number, 0, by)?;
                if heard.tag != Tag::More {
                    return Ok(heard);
                }
                channel.send(&Message::new(Tag::Payload, number).payload(payload), by)?;
            }
            let heard = expect(channel, &answers, number, result, by)?;
            if heard.tag == Tag::Done && heard.payload.len() != result {
                return Err(garbage(format!("{} bytes, expected {result}", heard.payload.len())));
            }
            Ok(heard)
        };
        let heard = talk(&mut link.channels[0]).map_err(|e| self.gone(0, &call.words, &e))?;
        match heard.tag {
            Tag::Done => Ok(Ok(heard.payload)),
            Tag::Refused => Ok(Err(heard.text())),
            _ => Err(heard.text()),
        }
    }

    fn gone(&self, rank: usize, call: &str, error: &std::io::Error) -> String {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                format!("tcp-group: rank {rank} did not join {call} within {:?}", self.timeout)
            }
            ErrorKind::InvalidData => {
                format!("tcp-group: rank {rank} sent {error} while others wait in {call}")
            }
            _ => format!("tcp-group: rank {rank} left the group while others wait in {call} ({error})"),
        }
    }

    /// A port, the address by which a rank that reaches us reaches it, and a token.
    fn open(&self) -> Result<(TcpListener, SocketAddr, Token)> {
        let link = lock(&self.link);
        let local = link.channels.first().map(|channel| channel.stream().local_addr());
        let here = local.transpose().map_err(|e| failed("find", "this rank's address", &e))?;
        let host = here.map_or_else(|| LOOPBACK.to_string(), |address| address.ip().to_string());
        let listener = TcpListener::bind((host.as_str(), 0)).map_err(|e| failed("listen on", &host, &e))?;
        let address = listener.local_addr().map_err(|e| failed("listen on", &host, &e))?;
        Ok((listener, address, Token::random()?))
    }
}

/// A collective as this rank makes it.
struct Call {
    kind: Kind,
    words: String,
    payload: Vec<u8>,
    /// What the payload was made of.
    host: Tensor,
}

/// What rank 0 answers: the result, or why there is none.
type Answer = std::result::Result<Vec<u8>, String>;

/// Where rank 0 listens unless told otherwise: this machine alone can reach it.
const LOOPBACK: &str = "127.0.0.1";

/// The next message, of one of these kinds and this call; that all is over may be said at any time.
fn expect(
    channel: &mut Channel,
    tags: &[Tag],
    call: u64,
    longest: usize,
    by: Deadline,
) -> std::io::Result<Message> {
    let message = channel.receive(longest, by)?;
    let of_this_call = message.call == call || message.tag == Tag::Broken;
    if !tags.contains(&message.tag) || !of_this_call {
        let (tag, number) = (message.tag, message.call);
        return Err(garbage(format!("{tag:?} of call {number}, expected {tags:?} of call {call}")));
    }
    Ok(message)
}

/// Polls until there is something or the time is up.
fn wait_for<T>(timeout: Duration, what: &str, mut poll: impl FnMut(Deadline) -> Option<T>) -> Result<T> {
    let by = Deadline::after(timeout);
    loop {
        if let Some(found) = poll(by) {
            return Ok(found);
        }
        if by.is_over() {
            bail!("tcp-group: waited {timeout:?} for {what}")
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn check_rank(rank: usize, world_size: usize) -> Result<()> {
    if rank >= world_size {
        bail!("tcp-group: got rank {rank}, expected one below the world size {world_size}")
    }
    Ok(())
}

fn failed(verb: &str, what: &str, e: &std::io::Error) -> candle_core::Error {
    error(format!("tcp-group: cannot {verb} {what}: {e}"))
}

fn env(name: &str) -> Result<String> {
    std::env::var(name).map_err(|_| error(format!("tcp-group: the environment has no {name}")))
}

/// A number that a launcher put into the environment.
pub(crate) fn env_number(name: &str) -> Result<usize> {
    let value = env(name)?;
    value
        .parse()
        .map_err(|_| error(format!("tcp-group: {name} is {value:?} in the environment, expected a number")))
}

impl ProcessGroup for TcpGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_gather(&self, what: &str, tensor: &Tensor) -> Result<Tensor> {
        self.exchange(Kind::Gather, what, tensor)
    }

    fn all_reduce_sum(&self, what: &str, tensor: &Tensor) -> Result<Tensor> {
        self.exchange(Kind::Sum, what, tensor)
    }

    fn broadcast(&self, what: &str, tensor: &Tensor, root: usize) -> Result<Tensor> {
        check_root(self.world_size, root)?;
        self.exchange(Kind::Broadcast(root), what, tensor)
    }

    fn split(&self, color: usize) -> Result<Arc<dyn ProcessGroup>> {
        let Part { rank, members } = colors(self, color)?;
        // The lowest rank of each part listens; all exchange where, and that part's token.
        let opened = (rank == 0).then(|| self.open()).transpose();
        let mut card = String::new();
        if let Ok(Some((_, address, token))) = &opened {
            card = format!("{address} {}", String::from_utf8_lossy(token.bytes()));
        }
        let mut bytes = [0u8; 256];
        bytes[..card.len()].copy_from_slice(card.as_bytes());
        let cards = self.all_gather("addresses of a split", &Tensor::new(&bytes, &Device::Cpu)?)?;
        let size = members.len();
        if let Some((listener, _, token)) = opened? {
            return Ok(Arc::new(Self::answer(&listener, &token, size, self.timeout)?));
        }
        let card = cards.get(members[0])?.to_dtype(DType::U8)?.to_vec1::<u8>()?;
        let card = String::from_utf8_lossy(&card).trim_end_matches('\0').to_string();
        let Some((address, token)) = card.split_once(' ') else {
            bail!("tcp-group: rank {} could not open a port for its part of a split", members[0])
        };
        Ok(Arc::new(Self::call(address, &Token::new(token)?, rank, size, self.timeout)?))
    }
}
